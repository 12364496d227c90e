//! Members find each other by the group's secret: same machine and local network, without an address known before.
//!
//! A device publishes where it can be dialled, sealed for the group, under an id that derives from the epoch's secret,
//! and looks the same id up now and then.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sync_core::connection::Event as Step;
use sync_crypto::{EpochKeys, open_box, seal_box};
use sync_link::rendezvous::{Found, LookupId, Publication, Record, race};
use sync_types::MemberRecord;

use crate::device::Inner;
use crate::group::Group;
use crate::keys::with_rng;
use crate::peers;

/// How long one look around takes: answers on a local network come within a second.
const LOOK: Duration = Duration::from_secs(4);
/// Wait between looks while nobody is connected.
const EVERY_ALONE: Duration = Duration::from_secs(15);
/// Wait between looks while someone is.
const EVERY: Duration = Duration::from_secs(120);
/// Age at which a record is published again, before a rendezvous takes it for stale.
const REPUBLISH: Duration = Duration::from_secs(30 * 60);
/// Purpose under which records are sealed.
const PURPOSE: &str = "member record";

/// Where and under what a group's members leave their records in an epoch.
struct Meeting {
    place: LookupId,
    key: [u8; 32],
}

impl Meeting {
    fn of(keys: &EpochKeys) -> Self {
        let secret = keys.rendezvous.expose_bytes();
        let mut place = [0; 16];
        place.copy_from_slice(&blake3::derive_key("syncshell v1 meeting place", secret)[..16]);
        Self { place: LookupId(place), key: blake3::derive_key("syncshell v1 meeting key", secret) }
    }

    fn now(group: &Group) -> Option<Self> {
        group.keys().current().ok().map(|(_, keys)| Self::of(keys))
    }
}

/// What is published at present.
struct Published {
    place: LookupId,
    addresses: Vec<SocketAddr>,
    at: Instant,
    _publications: Vec<Publication>,
}

/// Publishes this device and looks for others as long as the device is open.
pub(crate) async fn run(device: Arc<Inner>, group: Arc<Group>) {
    let closed = device.closed();
    let mut published: Option<Published> = None;
    loop {
        let Some(meeting) = Meeting::now(&group) else { return };
        let addresses = device.addresses();
        let current = |last: &Published| {
            last.place == meeting.place && last.addresses == addresses && last.at.elapsed() < REPUBLISH
        };
        if !published.as_ref().is_some_and(current) {
            let publications = publish(&device, &meeting, &addresses).await;
            let at = Instant::now();
            published = Some(Published { place: meeting.place, addresses, at, _publications: publications });
        }
        tokio::select! {
            () = look(&device, &group, &meeting) => {}
            () = closed.cancelled() => return,
        }
        let wait = if group.peers.live().is_empty() { EVERY_ALONE } else { EVERY };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = closed.cancelled() => return,
        }
    }
}

async fn publish(device: &Inner, meeting: &Meeting, addresses: &[SocketAddr]) -> Vec<Publication> {
    let mut all: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    if let Some(endpoint) = device.endpoint() {
        all.extend(endpoint.loopback_addresses().iter().map(ToString::to_string));
    }
    let plain = MemberRecord { device: device.device_id(), addresses: all }.encode();
    let sealed = with_rng(&device.shared.rng, |rng| seal_box(&meeting.key, PURPOSE, &meeting.place.0, &plain, rng));
    let mut publications = Vec::new();
    for rendezvous in &device.rendezvous {
        let published = match Record::new(sealed.clone()) {
            Ok(record) => rendezvous.publish(meeting.place, record).await,
            Err(error) => Err(error),
        };
        match published {
            Ok(publication) => publications.push(publication),
            Err(error) => tracing::debug!(way = rendezvous.name(), %error, "members cannot find this device this way"),
        }
    }
    publications
}

/// Looks around once.
async fn look(device: &Arc<Inner>, group: &Arc<Group>, meeting: &Meeting) {
    let mut lookup = race(device.rendezvous.iter().map(|rendezvous| rendezvous.lookup(meeting.place)));
    let _ = tokio::time::timeout(LOOK, async {
        while let Some(found) = lookup.next().await {
            let Found::Candidate { record, .. } = found else { continue };
            let opened = open_box(&meeting.key, PURPOSE, &meeting.place.0, record.as_bytes());
            let Some(member) = opened.ok().and_then(|plain| MemberRecord::decode(&plain).ok()) else {
                device.count_refused();
                continue;
            };
            let addresses = member.addresses.iter().filter_map(|text| text.parse().ok()).collect();
            if member.device != device.device_id() && group.peers.find(member.device, addresses) {
                group.peers.tell(&member.device, Step::AddressChanged);
                peers::want(device, group, member.device);
            }
        }
    })
    .await;
}
