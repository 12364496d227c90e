//! Where connections begin that are to become direct: at the relays of the groups, and which of them let this device in.
//!
//! A device is let in by a pass that it draws and that one of its authors names on its channel to the relay.
//! Only one group's channel names it, so that the relay learns of one author whose device it is, and not of the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sync_link::iroh_link::Relays;
use sync_link::relay::RelayUrl;
use sync_types::{DeviceId, GroupId};

use crate::device::Inner;
use crate::group::Group;
use crate::keys::draw;
use crate::{peers, relays};

/// What this device shows at relays.
#[derive(Debug)]
pub(crate) struct Punching {
    /// Whether n0's public relays are used while no group names one.
    public: bool,
    passes: Mutex<HashMap<String, Named>>,
}

/// A relay's pass, the same as long as the device is open: iroh asks for it only when it first connects.
#[derive(Debug)]
struct Named {
    pass: [u8; 16],
    /// The group on whose channel it is named.
    by: Option<GroupId>,
}

impl Punching {
    pub(crate) fn new(public: bool) -> Self {
        Self { public, passes: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Named>> {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to name on a group's channel to a relay, if it is this one's to name anything.
    fn name(&self, group: &GroupId, url: &RelayUrl, drawn: impl FnOnce() -> [u8; 16]) -> Option<[u8; 16]> {
        let mut passes = self.lock();
        let named = passes.entry(url.authority()).or_insert_with(|| Named { pass: drawn(), by: None });
        (*named.by.get_or_insert(*group) == *group).then_some(named.pass)
    }

    /// What this device shows at a relay, whoever names it.
    fn shown(&self, url: &RelayUrl, drawn: impl FnOnce() -> [u8; 16]) -> [u8; 16] {
        self.lock().entry(url.authority()).or_insert_with(|| Named { pass: drawn(), by: None }).pass
    }

    /// What a group has named at a relay.
    fn named(&self, group: &GroupId, url: &RelayUrl) -> Option<[u8; 16]> {
        self.lock().get(&url.authority()).filter(|named| named.by == Some(*group)).map(|named| named.pass)
    }

    /// Leaves it to another group to name the pass.
    fn leave(&self, group: &GroupId, url: &RelayUrl) {
        if let Some(named) = self.lock().get_mut(&url.authority()).filter(|named| named.by == Some(*group)) {
            named.by = None;
        }
    }
}

/// What a group names on a new channel to a relay.
pub(crate) fn name(device: &Inner, group: &Group, url: &RelayUrl) -> Option<[u8; 16]> {
    let punches = device.endpoint().is_some_and(sync_link::iroh_link::Endpoint::punches);
    if !punches || !url.takes_codes() {
        return None;
    }
    device.punching.name(&group.id, url, || draw(&device.shared.rng))
}

/// A relay takes this device as a member's: connections may begin there.
pub(crate) async fn let_in(device: &Arc<Inner>, group: &Arc<Group>, url: &RelayUrl) {
    if let Some(pass) = device.punching.named(&group.id, url)
        && use_relay(device, url, &pass).await
    {
        peers::dial_again(group);
    }
}

/// What this device names where it takes the record of a code, to be let in there before it is a member.
pub(crate) fn pass_of_guest(device: &Inner, url: &RelayUrl) -> Option<[u8; 16]> {
    let punches = device.endpoint().is_some_and(sync_link::iroh_link::Endpoint::punches);
    (punches && url.takes_codes()).then(|| device.punching.shown(url, || draw(&device.shared.rng)))
}

/// A relay has let this device in, by this pass.
pub(crate) async fn use_relay(device: &Inner, url: &RelayUrl, pass: &[u8; 16]) -> bool {
    let Some(endpoint) = device.endpoint() else { return false };
    let pass: String = pass.iter().map(|byte| format!("{byte:02x}")).collect();
    endpoint.use_relay(url, &pass).await
}

/// A group's channel to a relay has ended for good.
pub(crate) fn leave(device: &Inner, group: &Group, url: &RelayUrl) {
    device.punching.leave(&group.id, url);
}

/// Has connections begin at no relay that no group uses, and at n0's while there is none at all.
pub(crate) async fn follow(device: &Inner) {
    let Some(endpoint) = device.endpoint().filter(|endpoint| endpoint.punches()) else { return };
    let mut used = relays::of_home(device).await;
    for group in device.groups().values() {
        relays::add_new(&mut used, relays::used(group).await);
    }
    endpoint.keep_relays(&used).await;
    endpoint.use_public_relays(device.punching.public && used.is_empty()).await;
}

/// Follows the relay at which others find this device; what they are told follows it.
pub(crate) async fn run(device: Arc<Inner>, changed: impl Fn() + Send) {
    let Some(endpoint) = device.endpoint() else { return };
    let mut home = endpoint.watch_home_relay();
    let closed = device.closed();
    loop {
        tokio::select! {
            changed = home.changed() => if changed.is_err() { return },
            () = closed.cancelled() => return,
        }
        changed();
        if home.borrow_and_update().is_some() {
            peers::network_changed(&device.groups());
        }
    }
}

/// The relays at which a group's device may be found.
pub(crate) async fn relays_of(group: &Group, peer: &DeviceId) -> Relays {
    let stored = group.stored_peers().await.into_iter().filter(|known| known.device == Some(*peer));
    Relays { ours: relays::used(group).await, told: stored.flat_map(|known| known.addresses).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_group_names_the_pass_of_a_relay_and_another_once_it_is_left_to_it() {
        let punching = Punching::new(false);
        let [relay, other] = [1, 2].map(|port| RelayUrl::new("relay.example", port, &[7; 32]));
        let [anna, ben] = [1, 2].map(|byte| GroupId([byte; 32]));
        assert_eq!(punching.name(&anna, &relay, || [1; 16]), Some([1; 16]));
        assert_eq!(punching.name(&anna, &relay, || [2; 16]), Some([1; 16]), "as long as the device is open");
        assert_eq!(punching.name(&ben, &relay, || [3; 16]), None, "both authors would be one device's");
        assert_eq!(punching.name(&ben, &other, || [4; 16]), Some([4; 16]), "relays cannot compare");
        assert_eq!((punching.named(&anna, &relay), punching.named(&ben, &relay)), (Some([1; 16]), None));
        punching.leave(&ben, &relay);
        assert_eq!(punching.name(&ben, &relay, || [5; 16]), None, "it was not its to leave");
        punching.leave(&anna, &relay);
        assert_eq!(punching.name(&ben, &relay, || [6; 16]), Some([1; 16]));
    }
}
