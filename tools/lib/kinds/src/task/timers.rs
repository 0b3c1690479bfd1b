//! Interval timers (setitimer(2)) and POSIX timers (timer_create(2)).
//!
//! Of POSIX timers, `/proc/PID/timers` lists ids, clocks and how they notify; times are known only to
//! the task itself. Times left are stored, so a timer goes on where it was, however long the image lay.
//! Overruns are stored for readers of the images; the kernel counts them anew, and no call sets the count.
//! Timers are read before pending signals: one that expires in between is then stored as both
//! running and pending, never as neither.
//!
//! A timer's id is what the program holds, so it has to come back the same. Since Linux 6.15 a task may
//! ask to choose it (PR_TIMER_CREATE_RESTORE_IDS). Before, ids are given out counting up from 0 in each
//! process, so timers in between are made and deleted.

use anyhow::Context;
use ckpt_proc::timers::{self, Notify};
use ckpt_proto::types::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use ckpt_remote::{Arg, Call};
use ckpt_sys::{Pid, Refused, prctl, procfs};

use super::answers::{Answers, u64_at, words};

const ITIMERS: [(i32, &str); 3] = [(0, "ITIMER_REAL"), (1, "ITIMER_VIRTUAL"), (2, "ITIMER_PROF")];
const SIGEV_NONE: u32 = 1;
const SIGEV_THREAD: u32 = 2;
const SIGEV_THREAD_ID: u32 = 4;
/// Highest id that is reached by counting.
const MAX_COUNTED: u32 = 10_000;

/// An ITIMER_REAL that has expired is started again when its SIGALRM is taken, and stands still (no time
/// left, but an interval) while that is pending. Nothing else tells the kernel to start it: setting such a
/// value would stop it for good. So it is stored as just started.
fn about_to_tick(it: ItimerEntry) -> ItimerEntry {
    if (it.vsec, it.vusec) == (0, 0) { ItimerEntry { vsec: it.isec, vusec: it.iusec, ..it } } else { it }
}

/// The process's POSIX timers; none on kernels without the file.
pub(super) fn list(pid: Pid) -> anyhow::Result<Vec<timers::Timer>> {
    let path = format!("/proc/{pid}/timers");
    match procfs::read(&path) {
        Ok(text) => timers::parse(&text).with_context(|| path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && std::fs::exists(format!("/proc/{pid}"))? => {
            Err(Refused::new(path, "is missing, so timers can't be known")
                .advise("the kernel needs CONFIG_CHECKPOINT_RESTORE and CONFIG_POSIX_TIMERS")
                .into())
        }
        Err(e) => Err(e).context(path),
    }
}

pub(super) fn ask(timers: &[timers::Timer], calls: &mut Vec<Call>) {
    for (which, name) in ITIMERS {
        calls.push(Call::new(
            format!("getitimer({name})"),
            libc::SYS_getitimer,
            [which.into(), Arg::Out(32)],
        ));
    }
    for timer in timers {
        let id = timer.id;
        calls.push(Call::new(
            format!("timer_gettime({id})"),
            libc::SYS_timer_gettime,
            [id.into(), Arg::Out(32)],
        ));
        calls.push(Call::new(format!("timer_getoverrun({id})"), libc::SYS_timer_getoverrun, [id.into()]));
    }
}

pub(super) fn read(timers: &[timers::Timer], answers: &mut Answers) -> anyhow::Result<TaskTimersEntry> {
    let mut interval = || {
        let it = answers.bytes()?;
        anyhow::Ok(ItimerEntry {
            isec: u64_at(&it, 0),
            iusec: u64_at(&it, 8),
            vsec: u64_at(&it, 16),
            vusec: u64_at(&it, 24),
        })
    };
    let (real, virt, prof) = (about_to_tick(interval()?), interval()?, interval()?);
    let posix = timers.iter().map(|timer| {
        let it = answers.bytes()?;
        let overrun = answers.value()?;
        let notify = match timer.notify {
            Notify::Signal => 0,
            Notify::None => SIGEV_NONE,
            Notify::Thread => SIGEV_THREAD,
        };
        Ok(PosixTimerEntry {
            it_id: timer.id.cast_unsigned(),
            clock_id: timer.clock.cast_unsigned(),
            si_signo: timer.signal.cast_unsigned(),
            it_sigev_notify: notify | timer.thread.map_or(0, |_| SIGEV_THREAD_ID),
            sival_ptr: timer.value,
            overrun: u32::try_from(overrun).unwrap_or(u32::MAX),
            isec: u64_at(&it, 0),
            insec: u64_at(&it, 8),
            vsec: u64_at(&it, 16),
            vnsec: u64_at(&it, 24),
            notify_thread_id: timer.thread,
        })
    });
    Ok(TaskTimersEntry { posix: posix.collect::<anyhow::Result<_>>()?, real, virt, prof })
}

pub(super) fn check(timers: &TaskTimersEntry) -> anyhow::Result<()> {
    let highest = timers.posix.iter().map(|t| t.it_id).max().unwrap_or(0);
    if highest > MAX_COUNTED && !prctl::timer_restore_ids() {
        return Err(Refused::new(
            format!("POSIX timer {highest}"),
            "this kernel can't give a timer so high an id",
        )
        .advise("restore on Linux 6.15 or later")
        .into());
    }
    Ok(())
}

pub(super) fn restore(timers: &TaskTimersEntry) -> Vec<Call> {
    restore_with(timers, prctl::timer_restore_ids())
}

fn restore_with(timers: &TaskTimersEntry, chosen_ids: bool) -> Vec<Call> {
    let mut calls = Vec::new();
    for ((which, name), it) in ITIMERS.into_iter().zip([about_to_tick(timers.real), timers.virt, timers.prof])
    {
        // fork(2) clears them.
        if [it.isec, it.iusec, it.vsec, it.vusec] != [0; 4] {
            let value = Arg::In(words(&[it.isec, it.iusec, it.vsec, it.vusec]));
            calls.push(Call::new(
                format!("setitimer({name})"),
                libc::SYS_setitimer,
                [which.into(), value, Arg::Val(0)],
            ));
        }
    }
    let mut posix: Vec<&PosixTimerEntry> = timers.posix.iter().collect();
    posix.sort_by_key(|t| t.it_id);
    if posix.is_empty() {
        return calls;
    }
    if chosen_ids {
        calls.push(restore_ids(1));
    }
    let mut next = 0_u32;
    for timer in &posix {
        let id = timer.it_id;
        if !chosen_ids {
            for skipped in next..id.min(MAX_COUNTED) {
                // Any timer will do; this one never signals.
                calls.push(create(
                    skipped,
                    libc::CLOCK_MONOTONIC.cast_unsigned(),
                    &[0, 1 << 32, 0, 0, 0, 0, 0, 0],
                ));
                let args = [Arg::Val(skipped.into())];
                calls.push(Call::new(format!("timer_delete({skipped})"), libc::SYS_timer_delete, args));
            }
            next = id.saturating_add(1);
        }
        // struct sigevent: sival u64, signo i32, notify i32, thread id i32.
        let signo_and_notify = u64::from(timer.si_signo) | u64::from(timer.it_sigev_notify) << 32;
        let thread = u64::from(timer.notify_thread_id.unwrap_or(0).cast_unsigned());
        calls.push(create(id, timer.clock_id, &[timer.sival_ptr, signo_and_notify, thread, 0, 0, 0, 0, 0]));
    }
    if chosen_ids {
        calls.push(restore_ids(0));
    }
    for timer in posix.iter().filter(|t| [t.isec, t.insec, t.vsec, t.vnsec] != [0; 4]) {
        let value = Arg::In(words(&[timer.isec, timer.insec, timer.vsec, timer.vnsec]));
        let args = [Arg::Val(timer.it_id.into()), Arg::Val(0), value, Arg::Val(0)];
        calls.push(Call::new(format!("timer_settime({})", timer.it_id), libc::SYS_timer_settime, args));
    }
    calls
}

fn restore_ids(on: u64) -> Call {
    let args =
        [prctl::PR_TIMER_CREATE_RESTORE_IDS.into(), Arg::Val(on), Arg::Val(0), Arg::Val(0), Arg::Val(0)];
    Call::new("prctl(PR_TIMER_CREATE_RESTORE_IDS)", libc::SYS_prctl, args)
}

fn create(id: u32, clock: u32, sigevent: &[u64; 8]) -> Call {
    let args = [clock.cast_signed().into(), Arg::In(words(sigevent)), Arg::InOut(id.to_le_bytes().to_vec())];
    Call::new(format!("timer_create({id})"), libc::SYS_timer_create, args)
}

#[cfg(test)]
mod tests {
    use super::{super::selfcalls::Own, *};
    use ckpt_remote::Syscalls;
    use ckpt_sys::selfcall;
    use nix::sys::signal::SigSet;

    fn own_pending() -> u64 {
        super::super::creds::own_status().shared_pending
    }

    fn sample() -> TaskTimersEntry {
        let none = ItimerEntry { isec: 0, iusec: 0, vsec: 0, vusec: 0 };
        let posix = |it_id, clock_id, notify, vsec| PosixTimerEntry {
            it_id,
            clock_id,
            si_signo: 40,
            it_sigev_notify: notify,
            sival_ptr: 0xdead_beef_0000_0001,
            overrun: 0,
            // The kernel forgets the interval of a timer that is not running.
            isec: if vsec == 0 { 0 } else { 7 },
            insec: 0,
            vsec,
            vnsec: 0,
            notify_thread_id: (notify == SIGEV_THREAD_ID).then(|| nix::unistd::gettid().as_raw()),
        };
        let posix =
            vec![posix(9, 1, 0, 1000), posix(2, 0, SIGEV_NONE, 2000), posix(4, 7, SIGEV_THREAD_ID, 0)];
        TaskTimersEntry {
            real: ItimerEntry { isec: 3, iusec: 4, vsec: 900, vusec: 0 },
            virt: none,
            prof: none,
            posix,
        }
    }

    fn come_back_the_same(chosen_ids: bool) {
        let code = selfcall::in_child(|| {
            let wanted = sample();
            Own.run(&restore_with(&wanted, chosen_ids)).unwrap();
            let pid = Pid(nix::unistd::getpid().as_raw());
            let timers = list(pid).unwrap();
            let mut calls = Vec::new();
            ask(&timers, &mut calls);
            let found = read(&timers, &mut Answers::run(&mut Own, calls).unwrap()).unwrap();
            assert_eq!((found.real.isec, found.real.iusec), (3, 4));
            assert!((890..=900).contains(&found.real.vsec), "{found:?}");
            assert_eq!(found.virt, wanted.virt);
            assert_eq!(found.posix.len(), 3);
            for mut want in wanted.posix {
                want.notify_thread_id = want.notify_thread_id.map(|_| nix::unistd::gettid().as_raw());
                let mut got = *found.posix.iter().find(|t| t.it_id == want.it_id).unwrap();
                assert!(want.vsec.abs_diff(got.vsec) <= 10, "{got:?}");
                (got.vsec, got.vnsec) = (want.vsec, want.vnsec);
                assert_eq!(got, want);
            }
            0
        });
        assert_eq!(code, Some(0));
    }

    #[test]
    fn interval_timer_goes_on_though_it_expired_while_frozen() {
        let code = selfcall::in_child(|| {
            // SIGALRM can't be taken, as in a frozen task.
            SigSet::all().thread_block().unwrap();
            let mut wanted = sample();
            wanted.posix.clear();
            wanted.real = ItimerEntry { isec: 0, iusec: 10_000, vsec: 0, vusec: 1 };
            Own.run(&restore(&wanted)).unwrap();
            while own_pending() & 1 << 13 == 0 {}
            let mut calls = Vec::new();
            ask(&[], &mut calls);
            let found = read(&[], &mut Answers::run(&mut Own, calls).unwrap()).unwrap();
            assert_eq!((found.real.iusec, found.real.vusec), (10_000, 10_000));
            wanted.real.vusec = 0;
            let calls = restore(&wanted);
            assert_eq!(calls.len(), 1, "as an image of somebody else may have it");
            0
        });
        assert_eq!(code, Some(0));
    }

    #[test]
    fn timers_come_back_with_their_ids() {
        come_back_the_same(prctl::timer_restore_ids());
    }

    #[test]
    fn timers_come_back_with_their_ids_on_older_kernels() {
        come_back_the_same(false);
    }
}
