//! The connection to one peer: a pure function from state and event to state and actions.
//!
//! The shell dials, times and hangs up as the actions say, and reports what happened as events.

use std::time::Duration;

/// Wait before the first new attempt: long enough not to hammer a restarting peer, short enough not to be noticed.
pub const FIRST_BACK_OFF: Duration = Duration::from_millis(200);
/// Longest wait between attempts: a peer that comes back is reached within seconds.
pub const MAX_BACK_OFF: Duration = Duration::from_secs(5);
/// Time a handshake may take; a peer that says nothing is let go.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the connection to a peer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Nobody asked for a connection.
    Disconnected,
    /// The peer is being dialled.
    Connecting {
        /// Attempts made before this one since the last success.
        attempt: u32,
    },
    /// A channel stands, the peer has not proven itself yet.
    Handshaking {
        /// Attempts made before this one since the last success.
        attempt: u32,
    },
    /// The peer has proven itself; entries flow.
    Connected,
    /// Waiting before the next attempt.
    Reconnecting {
        /// Attempts made since the last success.
        attempt: u32,
        /// How long the wait is.
        wait: Duration,
    },
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Someone wants this peer.
    Wanted,
    /// Nobody wants this peer any more.
    Unwanted,
    /// The dial led to a channel.
    Opened,
    /// The peer opened a channel to us.
    Accepted,
    /// The handshake succeeded.
    Established,
    /// Dial, handshake or channel failed or ended.
    Lost,
    /// The wait is over.
    Timeout,
    /// The peer has a new address, or the network changed.
    AddressChanged,
    /// The peer refused us for good.
    Refused,
}

/// What the shell is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Dial the peer.
    Dial,
    /// Report a [`Event::Timeout`] after this time, forgetting an earlier order.
    SetTimer(Duration),
    /// Forget the timer.
    ClearTimer,
    /// End the channel or the dial.
    HangUp,
}

/// Goes from one state to the next; `jitter` is random and spreads the attempts of many peers.
#[must_use]
pub fn step(state: State, event: Event, jitter: u64) -> (State, Vec<Action>) {
    use State::{Connected, Connecting, Disconnected, Handshaking, Reconnecting};
    let stay = (state, Vec::new());
    match (state, event) {
        (Disconnected, Event::Unwanted | Event::Lost | Event::Timeout | Event::AddressChanged | Event::Refused) => stay,
        (_, Event::Unwanted | Event::Refused) => (Disconnected, vec![Action::ClearTimer, Action::HangUp]),
        (Disconnected, Event::Wanted) => (Connecting { attempt: 0 }, vec![Action::Dial]),
        (_, Event::Wanted) => stay,
        (Disconnected | Connecting { .. } | Reconnecting { .. }, Event::Opened | Event::Accepted) => {
            (Handshaking { attempt: attempts(state) }, vec![Action::SetTimer(HANDSHAKE_TIMEOUT)])
        }
        (Handshaking { .. } | Connected, Event::Opened | Event::Accepted) => stay,
        (Handshaking { .. }, Event::Established) => (Connected, vec![Action::ClearTimer]),
        (_, Event::Established) => stay,
        (Connected, Event::Lost) => wait(0, jitter),
        (Connecting { attempt } | Handshaking { attempt }, Event::Lost) => wait(attempt.saturating_add(1), jitter),
        (Reconnecting { .. }, Event::Lost) => stay,
        (Handshaking { attempt }, Event::Timeout) => {
            let (state, mut actions) = wait(attempt.saturating_add(1), jitter);
            actions.insert(0, Action::HangUp);
            (state, actions)
        }
        (Reconnecting { attempt, .. }, Event::Timeout) => (Connecting { attempt }, vec![Action::Dial]),
        (Connecting { .. } | Connected, Event::Timeout) => stay,
        (Reconnecting { .. }, Event::AddressChanged) => {
            (Connecting { attempt: 0 }, vec![Action::ClearTimer, Action::Dial])
        }
        (Connecting { .. } | Handshaking { .. } | Connected, Event::AddressChanged) => stay,
    }
}

fn attempts(state: State) -> u32 {
    match state {
        State::Connecting { attempt } | State::Handshaking { attempt } | State::Reconnecting { attempt, .. } => attempt,
        State::Disconnected | State::Connected => 0,
    }
}

fn wait(attempt: u32, jitter: u64) -> (State, Vec<Action>) {
    let wait = back_off(attempt, jitter);
    (State::Reconnecting { attempt, wait }, vec![Action::SetTimer(wait)])
}

/// Doubles with every attempt up to [`MAX_BACK_OFF`]; half of it is random.
#[must_use]
pub fn back_off(attempt: u32, jitter: u64) -> Duration {
    let full = FIRST_BACK_OFF.saturating_mul(1 << attempt.min(16)).min(MAX_BACK_OFF);
    let half = full / 2;
    let spread = u64::try_from(half.as_millis()).unwrap_or(u64::MAX);
    half + Duration::from_millis(jitter % (spread + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(events: &[Event]) -> (State, Vec<Action>) {
        let mut state = State::Disconnected;
        let mut all = Vec::new();
        for &event in events {
            let (next, actions) = step(state, event, 7);
            state = next;
            all.extend(actions);
        }
        (state, all)
    }

    #[test]
    fn a_peer_is_dialled_greeted_and_kept() {
        let (state, actions) = run(&[Event::Wanted, Event::Opened, Event::Established]);
        assert_eq!(state, State::Connected);
        assert_eq!(actions, vec![Action::Dial, Action::SetTimer(HANDSHAKE_TIMEOUT), Action::ClearTimer]);
    }

    #[test]
    fn attempts_back_off_and_a_new_address_ends_the_wait() {
        let failed = [Event::Lost, Event::Timeout].repeat(20);
        let (state, _) = run(&[&[Event::Wanted], &failed[..], &[Event::Lost]].concat());
        let State::Reconnecting { attempt: 21, wait } = state else { panic!("{state:?}") };
        assert!(wait <= MAX_BACK_OFF && wait >= MAX_BACK_OFF / 2);
        let (state, actions) = step(state, Event::AddressChanged, 0);
        assert_eq!((state, actions), (State::Connecting { attempt: 0 }, vec![Action::ClearTimer, Action::Dial]));
    }

    #[test]
    fn a_silent_peer_is_let_go() {
        let (state, actions) = run(&[Event::Wanted, Event::Opened, Event::Timeout]);
        assert!(matches!(state, State::Reconnecting { attempt: 1, .. }));
        assert!(actions.contains(&Action::HangUp));
    }

    #[test]
    fn a_refusal_is_final_until_someone_asks_again() {
        let (state, _) = run(&[Event::Wanted, Event::Opened, Event::Refused, Event::Lost, Event::Timeout]);
        assert_eq!(state, State::Disconnected);
        assert_eq!(step(state, Event::Wanted, 0).1, vec![Action::Dial]);
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop::sample::select(vec![
            Event::Wanted,
            Event::Unwanted,
            Event::Opened,
            Event::Accepted,
            Event::Established,
            Event::Lost,
            Event::Timeout,
            Event::AddressChanged,
            Event::Refused,
        ])
    }

    proptest! {
        #[test]
        fn a_wanted_peer_is_never_forgotten(events in prop::collection::vec(any_event(), 0..50), jitter: u64) {
            // after whatever happened, losing the channel leads to a timer, and the timer to a dial
            let mut state = State::Disconnected;
            for event in events {
                state = step(state, event, jitter).0;
            }
            let (state, _) = step(state, Event::Wanted, jitter);
            let (state, _) = step(state, Event::Lost, jitter);
            prop_assert!(matches!(state, State::Reconnecting { .. }), "{state:?}");
            let (_, actions) = step(state, Event::Timeout, jitter);
            prop_assert_eq!(actions, vec![Action::Dial]);
        }
    }
}
