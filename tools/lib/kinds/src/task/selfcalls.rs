//! For tests: a "task" that is the calling thread itself.

use ckpt_remote::{Arg, Call, Done, RemoteError, Syscalls};
use ckpt_sys::{
    Tid,
    selfcall::{self, Slot},
};

/// Runs lists in the calling thread.
pub(crate) struct Own;

impl Syscalls for Own {
    fn tid(&self) -> Tid {
        Tid(nix::unistd::gettid().as_raw())
    }

    fn run(&mut self, calls: &[Call]) -> Result<Vec<Done>, RemoteError> {
        let mut all = Vec::new();
        for call in calls {
            let slot = |arg: &Arg| match arg {
                Arg::Val(n) => Slot::Val(*n),
                Arg::In(bytes) | Arg::InOut(bytes) => Slot::Bytes(bytes.clone()),
                Arg::Out(len) => Slot::Bytes(vec![0; *len]),
            };
            let mut slots: Vec<Slot> = call.args.iter().map(slot).collect();
            let ret = selfcall::run(call.nr, &mut slots);
            let out = call.args.iter().zip(slots).filter_map(|(arg, slot)| match (arg, slot) {
                (Arg::Out(_) | Arg::InOut(_), Slot::Bytes(bytes)) => Some(bytes),
                _ => None,
            });
            let done = Done { ret, out: out.collect() };
            if let (Err(errno), false) = (done.result(), call.may_fail) {
                return Err(RemoteError::Call { tid: self.tid(), name: call.name.clone(), errno });
            }
            all.push(done);
        }
        Ok(all)
    }
}
