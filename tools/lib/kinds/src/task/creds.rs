//! Credentials of a thread (credentials(7), capabilities(7)): user and group ids, groups, capability
//! sets, securebits, no_new_privs.
//!
//! All but securebits is in `/proc/PID/task/TID/status`. Only the thread itself can change them, and the
//! order is what the kernel's rules leave:
//!
//! 1. inheritable capabilities, while the bounding set still has them;
//! 2. the bounding set, while CAP_SETPCAP is held;
//! 3. groups and group ids, then user ids, with "keep capabilities" set so that leaving uid 0 does not
//!    lose the permitted set; it clears the effective one, which is raised again;
//! 4. the file system user id, which uid changes set too;
//! 5. ambient capabilities, which must be permitted and inheritable at that time;
//! 6. securebits, which need CAP_SETPCAP and may forbid what came before;
//! 7. the final capability sets, no_new_privs, and the parent-death signal, which 3 resets.
//!
//! A task being built has the credentials of `ckpt-restore`. Only what differs from those is changed, so
//! that a user can restore his own tasks without privileges.

use ckpt_proc::status::{self, Caps, Ids, Status};
use ckpt_proto::types::CredsEntry;
use ckpt_remote::{Arg, Call};
use ckpt_sys::{
    Refused,
    capability::{
        has, names,
        number::{SETGID, SETPCAP, SETUID},
    },
    prctl,
};

use super::answers::{Answers, malformed};

/// linux/limits.h
const NGROUPS_MAX: usize = 65536;
const SECBIT_KEEP_CAPS: u32 = 1 << 4;
/// linux/prctl.h
const PR_GET_SECUREBITS: i32 = 27;
const PR_SET_SECUREBITS: i32 = 28;
const PR_SET_KEEPCAPS: i32 = 8;
const PR_CAPBSET_DROP: i32 = 24;
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: i32 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: i32 = 4;
const PR_SET_NO_NEW_PRIVS: i32 = 38;

pub(super) fn ask(calls: &mut Vec<Call>) {
    calls.push(Call::new("prctl(PR_GET_SECUREBITS)", libc::SYS_prctl, [PR_GET_SECUREBITS.into()]));
}

fn halves(set: u64) -> Vec<u32> {
    vec![(set & 0xffff_ffff) as u32, (set >> 32) as u32]
}

fn whole(set: &[u32]) -> u64 {
    set.iter().take(2).rev().fold(0, |all, &half| all << 32 | u64::from(half))
}

pub(super) fn read(status: &Status, answers: &mut Answers) -> anyhow::Result<CredsEntry> {
    let (uid, gid, caps) = (status.uid, status.gid, status.caps);
    Ok(CredsEntry {
        uid: uid.real,
        gid: gid.real,
        euid: uid.effective,
        egid: gid.effective,
        suid: uid.saved,
        sgid: gid.saved,
        fsuid: uid.fs,
        fsgid: gid.fs,
        cap_inh: halves(caps.inheritable),
        cap_prm: halves(caps.permitted),
        cap_eff: halves(caps.effective),
        cap_bnd: halves(caps.bounding),
        secbits: u32::try_from(answers.value()?)?,
        groups: status.groups.clone(),
        lsm_profile: None,
        lsm_sockcreate: None,
        apparmor_data: None,
        no_new_privs: status.no_new_privs.then_some(1),
        cap_amb: halves(caps.ambient),
    })
}

/// Credentials in comparable form.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Creds {
    uid: Ids,
    gid: Ids,
    groups: Vec<u32>,
    caps: Caps,
    securebits: u32,
}

/// The calling thread's status.
pub(super) fn own_status() -> Status {
    let text = std::fs::read("/proc/thread-self/status").unwrap_or_default();
    status::parse(&text).unwrap_or_default()
}

impl Creds {
    fn own() -> Self {
        let status = own_status();
        let mut groups = status.groups;
        groups.sort_unstable();
        Self { uid: status.uid, gid: status.gid, groups, caps: status.caps, securebits: prctl::securebits() }
    }

    fn of(entry: &CredsEntry) -> Self {
        let mut groups = entry.groups.clone();
        groups.sort_unstable();
        Self {
            uid: Ids { real: entry.uid, effective: entry.euid, saved: entry.suid, fs: entry.fsuid },
            gid: Ids { real: entry.gid, effective: entry.egid, saved: entry.sgid, fs: entry.fsgid },
            groups,
            caps: Caps {
                inheritable: whole(&entry.cap_inh),
                permitted: whole(&entry.cap_prm),
                effective: whole(&entry.cap_eff),
                bounding: whole(&entry.cap_bnd),
                ambient: whole(&entry.cap_amb),
            },
            securebits: entry.secbits,
        }
    }
}

/// Refuses credentials that this process can't pass on.
pub(super) fn check(entry: &CredsEntry) -> anyhow::Result<()> {
    if entry.groups.len() > NGROUPS_MAX {
        return Err(malformed(format!("{} supplementary groups", entry.groups.len())));
    }
    check_with(&Creds::of(entry), &Creds::own())
}

fn check_with(want: &Creds, have: &Creds) -> anyhow::Result<()> {
    let held = have.caps.permitted;
    let subject = "credentials";
    let missing = (want.caps.permitted | want.caps.effective | want.caps.ambient) & !held;
    if missing != 0 {
        let reason = format!("the task holds capabilities that this process doesn't: {}", names(missing));
        return Err(Refused::new(subject, reason).advise("run ckpt-restore with these capabilities").into());
    }
    let lacks = |cap, what: &str| {
        let reason = format!("{what} need {}", names(1_u64 << cap));
        Err(Refused::new(subject, reason).advise("run ckpt-restore as root or with that capability").into())
    };
    if want.uid != have.uid && !has(held, SETUID) {
        return lacks(SETUID, &format!("the task's user ids ({})", want.uid.real));
    }
    if (want.gid != have.gid || want.groups != have.groups) && !has(held, SETGID) {
        return lacks(SETGID, &format!("the task's groups ({})", want.gid.real));
    }
    let changes_sets = want.securebits != have.securebits
        || have.caps.bounding & !want.caps.bounding != 0
        || want.caps.inheritable & !(have.caps.inheritable | held) != 0;
    if changes_sets && !has(held, SETPCAP) {
        return lacks(SETPCAP, "the task's securebits and capability bounds");
    }
    Ok(())
}

fn prctl_call(name: impl Into<String>, option: i32, args: &[u64]) -> Call {
    let mut all: Vec<Arg> = vec![option.into()];
    all.extend(args.iter().map(|&n| Arg::Val(n)));
    all.resize(5, Arg::Val(0));
    Call::new(name, libc::SYS_prctl, all)
}

fn capset(permitted: u64, effective: u64, inheritable: u64) -> Call {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    let (p, e, i) = (halves(permitted), halves(effective), halves(inheritable));
    let data =
        e.iter().zip(&p).zip(&i).flat_map(|((e, p), i)| [*e, *p, *i]).flat_map(u32::to_le_bytes).collect();
    Call::new("capset", libc::SYS_capset, [Arg::In(header), Arg::In(data)])
}

pub(super) fn restore(entry: &CredsEntry) -> Vec<Call> {
    let mut calls = change(&Creds::of(entry), &Creds::own(), &entry.groups);
    if entry.no_new_privs == Some(1) {
        calls.push(prctl_call("prctl(PR_SET_NO_NEW_PRIVS)", PR_SET_NO_NEW_PRIVS, &[1]));
    }
    calls
}

fn change(want: &Creds, have: &Creds, groups: &[u32]) -> Vec<Call> {
    let mut calls = Vec::new();
    // The bounding set can only shrink. What this process never had stays missing: it could be gained by
    // executing a file only.
    let drop = have.caps.bounding & !want.caps.bounding;
    let mut target = want.clone();
    target.caps.bounding = have.caps.bounding & !drop;
    if target == *have {
        return calls;
    }
    let all = have.caps.permitted;
    calls.push(capset(all, all, want.caps.inheritable));
    for cap in (0..64_u32).filter(|&c| has(drop, c)) {
        let name = format!("prctl(PR_CAPBSET_DROP, {})", names(1 << cap));
        calls.push(prctl_call(name, PR_CAPBSET_DROP, &[cap.into()]));
    }
    if want.uid != have.uid || want.gid != have.gid || want.groups != have.groups {
        calls.push(prctl_call("prctl(PR_SET_KEEPCAPS)", PR_SET_KEEPCAPS, &[1]).may_fail());
        if want.groups != have.groups {
            let list = groups.iter().flat_map(|g| g.to_le_bytes()).collect();
            let count = u64::try_from(groups.len()).unwrap_or(u64::MAX);
            calls.push(Call::new("setgroups", libc::SYS_setgroups, [Arg::Val(count), Arg::In(list)]));
        }
        let three = |ids: Ids| [ids.real, ids.effective, ids.saved].map(|id| Arg::Val(id.into()));
        calls.push(Call::new("setresgid", libc::SYS_setresgid, three(want.gid)));
        calls.push(Call::new("setfsgid", libc::SYS_setfsgid, [Arg::Val(want.gid.fs.into())]));
        calls.push(Call::new("setresuid", libc::SYS_setresuid, three(want.uid)));
        calls.push(capset(all, all, want.caps.inheritable));
        calls.push(Call::new("setfsuid", libc::SYS_setfsuid, [Arg::Val(want.uid.fs.into())]));
    }
    if have.caps.ambient != 0 || want.caps.ambient != 0 {
        let clear = PR_CAP_AMBIENT_CLEAR_ALL.unsigned_abs().into();
        calls.push(prctl_call("prctl(PR_CAP_AMBIENT_CLEAR_ALL)", PR_CAP_AMBIENT, &[clear]));
    }
    for cap in (0..64_u32).filter(|&c| has(want.caps.ambient, c)) {
        let raise = PR_CAP_AMBIENT_RAISE.unsigned_abs().into();
        let name = format!("prctl(PR_CAP_AMBIENT_RAISE, {})", names(1 << cap));
        calls.push(prctl_call(name, PR_CAP_AMBIENT, &[raise, cap.into()]));
    }
    if (want.securebits ^ have.securebits) & !SECBIT_KEEP_CAPS == 0 {
        let keep = u64::from(want.securebits & SECBIT_KEEP_CAPS != 0);
        calls.push(prctl_call("prctl(PR_SET_KEEPCAPS)", PR_SET_KEEPCAPS, &[keep]).may_fail());
    } else {
        calls.push(prctl_call("prctl(PR_SET_SECUREBITS)", PR_SET_SECUREBITS, &[want.securebits.into()]));
    }
    calls.push(capset(want.caps.permitted, want.caps.effective, want.caps.inheritable));
    calls
}

#[cfg(test)]
mod tests {
    use super::{super::selfcalls::Own, *};
    use ckpt_remote::Syscalls;
    use ckpt_sys::selfcall;

    fn dump_self() -> CredsEntry {
        let mut calls = Vec::new();
        ask(&mut calls);
        read(&own_status(), &mut Answers::run(&mut Own, calls).unwrap()).unwrap()
    }

    fn privileged() -> bool {
        let held = own_status().caps.effective;
        let can = [SETUID, SETGID, SETPCAP].iter().all(|&c| has(held, c));
        if !can {
            let needs = format!("needs {}", names(1 << SETUID | 1 << SETGID | 1 << SETPCAP));
            ckpt_tests::skip("credentials of others", &needs);
        }
        can
    }

    /// `change` applied to the own credentials can be given to a task.
    fn come_back(change: impl FnOnce(&mut CredsEntry)) {
        if !privileged() {
            return;
        }
        let _forking = crate::descriptors::forking();
        let code = selfcall::in_child(|| {
            let mut want = dump_self();
            change(&mut want);
            check(&want).unwrap();
            Own.run(&restore(&want)).unwrap();
            assert_eq!(dump_self(), want);
            0
        });
        assert_eq!(code, Some(0));
    }

    fn ids(entry: &mut CredsEntry, uids: [u32; 4], gids: [u32; 4]) {
        [entry.uid, entry.euid, entry.suid, entry.fsuid] = uids;
        [entry.gid, entry.egid, entry.sgid, entry.fsgid] = gids;
    }

    fn caps(entry: &mut CredsEntry, permitted: u64, effective: u64, inheritable: u64, ambient: u64) {
        entry.cap_prm = halves(permitted);
        entry.cap_eff = halves(effective);
        entry.cap_inh = halves(inheritable);
        entry.cap_amb = halves(ambient);
    }

    #[test]
    fn ordinary_users_come_back() {
        come_back(|c| {
            ids(c, [1000; 4], [100; 4]);
            c.groups = vec![4, 24, 1000];
            caps(c, 0, 0, 0, 0);
            c.no_new_privs = Some(1);
        });
    }

    #[test]
    fn different_real_effective_saved_and_fs_ids_come_back() {
        come_back(|c| {
            ids(c, [1000, 1001, 0, 1003], [5, 6, 7, 8]);
            let all = whole(&c.cap_prm);
            caps(c, all, 0, 0, 0);
        });
    }

    #[test]
    fn ambient_and_bounded_capabilities_of_a_user_come_back() {
        come_back(|c| {
            ids(c, [1000; 4], [100; 4]);
            let net = 1 << 10 | 1 << 12;
            caps(c, net, 1 << 10, net, 1 << 10);
            c.cap_bnd = halves(whole(&c.cap_bnd) & 0xffff);
        });
    }

    #[test]
    fn securebits_come_back_and_a_capability_survives_outside_the_bounding_set() {
        come_back(|c| {
            // noroot and its lock, no_setuid_fixup, no ambient raising
            c.secbits = 1 | 2 | 4 | 1 << 6;
            let few = 1 << 5 | 1 << 21;
            caps(c, few, few, 1 << 5, 0);
            c.cap_bnd = halves(0);
        });
    }

    #[test]
    fn equal_credentials_need_no_calls() {
        let _forking = crate::descriptors::forking();
        let code = selfcall::in_child(|| i32::try_from(restore(&dump_self()).len()).unwrap());
        assert_eq!(code, Some(0));
    }

    #[test]
    fn what_we_do_not_hold_is_refused_by_name() {
        let mut have = Creds::of(&dump_self());
        let mut want = have.clone();
        have.caps.permitted = 1 << 21;
        want.caps.permitted = 1 << 21 | 1 << 24;
        let text = format!("{:#}", check_with(&want, &have).unwrap_err());
        assert!(text.contains("CAP_SYS_RESOURCE") && !text.contains("CAP_SYS_ADMIN"), "{text}");
        want.caps.permitted = 0;
        want.caps.effective = 0;
        want.uid.real = 4242;
        let text = format!("{:#}", check_with(&want, &have).unwrap_err());
        assert!(text.contains("4242") && text.contains("CAP_SETUID"), "{text}");
    }
}
