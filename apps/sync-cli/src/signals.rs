//! The wish to stop, as the system passes it on.

use crate::exit::Failure;

#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};
#[cfg(windows)]
use tokio::signal::windows::{CtrlBreak, CtrlC, ctrl_break, ctrl_c};

/// Listens for Ctrl-C and for the system's request to end, from when it is made.
///
/// Make it before telling anyone anything: what they do next may be to press Ctrl-C.
#[derive(Debug)]
pub(crate) struct Stop {
    #[cfg(unix)]
    signals: [Signal; 2],
    #[cfg(windows)]
    signals: (CtrlC, CtrlBreak),
}

impl Stop {
    pub(crate) fn listen() -> Result<Self, Failure> {
        let failed = Failure::io("cannot listen for signals");
        #[cfg(unix)]
        let signals = signal(SignalKind::interrupt())
            .and_then(|interrupt| Ok([interrupt, signal(SignalKind::terminate())?]))
            .map_err(failed)?;
        #[cfg(windows)]
        let signals = ctrl_c().and_then(|pressed| Ok((pressed, ctrl_break()?))).map_err(failed)?;
        Ok(Self { signals })
    }

    /// Does something that may be broken off without harm, and fails if someone wishes that.
    pub(crate) async fn or<T>(&mut self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        tokio::select! {
            result = work => result,
            () = self.requested() => Err(Failure::new("interrupted", "broken off; nothing was done")),
        }
    }

    /// Waits for the wish to stop. Cancel safe.
    pub(crate) async fn requested(&mut self) {
        #[cfg(unix)]
        let [one, other] = &mut self.signals;
        #[cfg(windows)]
        let (one, other) = &mut self.signals;
        tokio::select! {
            _ = one.recv() => {}
            _ = other.recv() => {}
        }
    }
}
