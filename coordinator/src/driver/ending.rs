//! How a run ends.
//!
//! ```text
//! Running --Stop--> Stopping --Finished | nothing left to save | deadline--> Farewell --all gone | deadline--> over
//!    \---------------------------- Finished ------------------------------->/
//! ```

use super::Patience;
use duet_core::Millis;
use duet_core::scheduler::{FinishReason, Scheduler};

/// The end is shown for so long, also when nobody is left to be sent home: who watches wants to know
/// how it ended.
const SHOWN: Millis = Millis(1_500);

#[derive(Clone, Debug)]
enum Phase {
    Running,
    Stopping { until: Millis },
    Farewell { reason: FinishReason, from: Millis, until: Millis },
}

/// Where a run stands on its way out.
#[derive(Clone, Debug)]
pub(super) struct Ending {
    phase: Phase,
    patience: Patience,
    shown: bool,
}

impl Ending {
    pub(super) fn new(patience: Patience) -> Ending {
        Ending { phase: Phase::Running, patience, shown: false }
    }

    pub(super) fn is_stopping(&self) -> bool {
        !matches!(self.phase, Phase::Running)
    }

    pub(super) fn deadline(&self) -> Option<Millis> {
        match self.phase {
            Phase::Running => None,
            Phase::Stopping { until } => Some(until),
            // Looked at twice: when it has been shown, and when patience ends.
            Phase::Farewell { from, until, .. } => {
                Some(if self.shown { until } else { from.after(SHOWN).min(until) })
            }
        }
    }

    pub(super) fn stop(&mut self, now: Millis) {
        if matches!(self.phase, Phase::Running) {
            self.phase = Phase::Stopping { until: now.after(millis(self.patience.stop)) };
        }
    }

    pub(super) fn finished(&mut self, now: Millis, reason: FinishReason) {
        if !matches!(self.phase, Phase::Farewell { .. }) {
            let until = now.after(millis(self.patience.farewell));
            self.phase = Phase::Farewell { reason, from: now, until };
        }
    }

    /// The end, when it has come.
    pub(super) fn over(&mut self, now: Millis, scheduler: &Scheduler) -> Option<FinishReason> {
        match &self.phase {
            Phase::Running => None,
            Phase::Stopping { until } => {
                let late = *until <= now;
                if late {
                    tracing::warn!("no checkpoint in time; the journal holds what is new");
                }
                late.then_some(FinishReason::Stopped)
            }
            Phase::Farewell { reason, from, until } => {
                self.shown = from.after(SHOWN) <= now;
                let over = (self.shown && scheduler.connected() == 0) || *until <= now;
                over.then(|| reason.clone())
            }
        }
    }
}

fn millis(span: std::time::Duration) -> Millis {
    Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}
