//! timerfd_create(2): a timer that is read.
//!
//! `fdinfo` tells clock, setting and unread expirations, with one gap. A periodic timer that has
//! expired stands still until somebody asks: it then shows nothing left and one expiration, and when
//! the next ones were due is known to the kernel alone. timerfd_gettime(2) brings it up to date, as
//! the target's own read would; that changes nothing that the target could notice.
//!
//! At restore the timer goes on with the time that was left. One that was set to a time of the clock
//! (`TFD_TIMER_ABSTIME`) is set so again, to the clock as it stands plus what was left, so that
//! it goes on following steps of the clock.

use anyhow::Context;
use ckpt_proc::fdinfo::Special;
use ckpt_proto::types::{FdTypes, FileEntry, TimerfdEntry};
use ckpt_sys::{
    FileId,
    file::{self, TimerSpec},
};
use nix::time::{ClockId, clock_gettime};
use std::os::fd::AsFd;

use super::{Descriptor, FileTable, Opening, dump::reread};
use crate::Sink;

const ABSTIME: u32 = libc::TFD_TIMER_ABSTIME.cast_unsigned();
const CANCEL_ON_SET: u32 = libc::TFD_TIMER_CANCEL_ON_SET.cast_unsigned();

pub(super) fn recognise(d: &Descriptor) -> bool {
    d.is_anon("[timerfd]")
}

pub(super) fn dump(
    _: &mut FileTable,
    d: &Descriptor,
    id: FileId,
    _: &mut dyn Sink,
) -> anyhow::Result<Option<FileEntry>> {
    let told = |special: &Special| match special {
        Special::Timerfd(timer) => Ok(*timer),
        _ => Err(d.refuse("fdinfo does not tell its setting")),
    };
    let mut timer = told(&d.info.special)?;
    if timer.value == (0, 0) && timer.interval != (0, 0) {
        file::timerfd_gettime(d.copy.as_fd()).with_context(|| d.subject())?;
        timer = told(&reread(d)?.special)?;
    }
    let tfd = TimerfdEntry {
        id: id.0,
        flags: d.flags(),
        fown: d.fown()?,
        clockid: timer.clockid,
        ticks: timer.ticks,
        settime_flags: timer.settime_flags,
        vsec: timer.value.0,
        vnsec: timer.value.1,
        isec: timer.interval.0,
        insec: timer.interval.1,
    };
    Ok(Some(FileEntry { r#type: FdTypes::Timerfd.into(), id: id.0, tfd: Some(tfd), ..FileEntry::default() }))
}

/// The clock that an alarm clock shows; it can be read without the hardware for alarms.
fn readable(clock: i32) -> ClockId {
    ClockId::from_raw(match clock {
        libc::CLOCK_REALTIME_ALARM => libc::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME_ALARM => libc::CLOCK_BOOTTIME,
        clock => clock,
    })
}

pub(super) fn restore(opening: &mut Opening<'_>, entries: &[FileEntry]) -> anyhow::Result<()> {
    for entry in entries {
        let tfd = entry.tfd.as_ref().context("a timerfd without its entry")?;
        let what = || format!("timerfd {}", entry.id);
        let clock =
            i32::try_from(tfd.clockid).with_context(|| format!("{}: clock {}", what(), tfd.clockid))?;
        let fd = file::timerfd_create(clock).with_context(what)?;
        let mut spec = TimerSpec { value: (tfd.vsec, tfd.vnsec), interval: (tfd.isec, tfd.insec) };
        let flags = tfd.settime_flags & (ABSTIME | CANCEL_ON_SET);
        if flags & ABSTIME != 0 && spec.value != (0, 0) {
            let now = clock_gettime(readable(clock)).context("clock_gettime")?;
            let nanos = spec.value.1.saturating_add(now.tv_nsec().cast_unsigned());
            let seconds = spec.value.0.saturating_add(now.tv_sec().cast_unsigned());
            spec.value = (seconds.saturating_add(nanos / 1_000_000_000), nanos % 1_000_000_000);
        }
        // A timer that is not armed has flags and an interval to show all the same.
        if spec != TimerSpec::default() || flags != 0 {
            file::timerfd_settime(fd.as_fd(), flags.cast_signed(), spec).with_context(what)?;
        }
        if tfd.ticks > 0 {
            file::timerfd_set_ticks(fd.as_fd(), tfd.ticks).with_context(what)?;
        }
        Opening::set_flags(fd.as_fd(), tfd.flags)?;
        opening.keep(FileId(entry.id), fd)?;
    }
    Ok(())
}
