//! Token buckets, one for each who is to be limited, and counts of connections by address.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Buckets kept: those that are full again are forgotten first, and a flood of new ones forgets the others.
const MAX_BUCKETS: usize = 20_000;

/// Time in which a bucket fills.
const MINUTE: Duration = Duration::from_secs(60);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets each do so much a minute, and all of it at once after a minute of rest.
#[derive(Debug)]
pub(crate) struct Limiter<K> {
    per_minute: u32,
    buckets: Mutex<HashMap<K, Bucket>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl<K: Hash + Eq> Limiter<K> {
    pub(crate) fn new(per_minute: u32) -> Self {
        Self { per_minute, buckets: Mutex::default() }
    }

    /// Takes one from someone's bucket; false if it is empty.
    pub(crate) fn take(&self, who: K, now: Instant) -> bool {
        let full = f64::from(self.per_minute);
        let mut buckets = lock(&self.buckets);
        if buckets.len() >= MAX_BUCKETS && !buckets.contains_key(&who) {
            buckets.retain(|_, bucket| bucket.filled(full, now) < full);
            if buckets.len() >= MAX_BUCKETS {
                buckets.clear();
            }
        }
        let bucket = buckets.entry(who).or_insert(Bucket { left: full, at: now });
        bucket.left = bucket.filled(full, now);
        bucket.at = now;
        let allowed = bucket.left >= 1.0;
        if allowed {
            bucket.left -= 1.0;
        }
        allowed
    }

    /// Whether someone's bucket is empty.
    pub(crate) fn is_empty(&self, who: &K, now: Instant) -> bool {
        lock(&self.buckets).get(who).is_some_and(|bucket| bucket.filled(f64::from(self.per_minute), now) < 1.0)
    }
}

impl Bucket {
    fn filled(&self, full: f64, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        (self.left + full * since / MINUTE.as_secs_f64()).min(full)
    }
}

/// Counts connections, all and by address.
#[derive(Debug)]
pub(crate) struct Connections {
    most: usize,
    most_per_address: usize,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// Why a connection is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TooMany {
    /// There are as many as this relay takes.
    All,
    /// There are as many from this address.
    FromAddress,
}

/// A place among the connections, until dropped.
#[derive(Debug)]
pub(crate) struct Place {
    connections: Arc<Connections>,
    address: IpAddr,
}

impl Connections {
    pub(crate) fn new(most: usize, most_per_address: usize) -> Arc<Self> {
        Arc::new(Self { most, most_per_address, counts: Mutex::default() })
    }

    /// A place for a connection from an address.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Result<Place, TooMany> {
        let address = subscriber(address);
        let mut counts = lock(&self.counts);
        if counts.all >= self.most {
            return Err(TooMany::All);
        }
        let here = counts.by_address.entry(address).or_default();
        if *here >= self.most_per_address {
            return Err(TooMany::FromAddress);
        }
        *here += 1;
        counts.all += 1;
        Ok(Place { connections: self.clone(), address })
    }

    pub(crate) fn count(&self) -> usize {
        lock(&self.counts).all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = lock(&self.connections.counts);
        counts.all -= 1;
        if let Some(here) = counts.by_address.get_mut(&self.address) {
            *here -= 1;
            if *here == 0 {
                counts.by_address.remove(&self.address);
            }
        }
    }
}

/// What stands for one subscriber: of IPv6 the network, of which anyone has all addresses.
pub(crate) fn subscriber(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_empties_and_fills_again_over_a_minute() {
        let limiter = Limiter::new(6);
        let start = Instant::now();
        let taken = |at: Instant| (0..100).take_while(|_| limiter.take("a", at)).count();
        assert_eq!(taken(start), 6);
        assert!(limiter.is_empty(&"a", start) && !limiter.is_empty(&"b", start));
        assert_eq!(taken(start + Duration::from_secs(20)), 2);
        assert_eq!(taken(start + Duration::from_secs(3600)), 6, "rest is not saved up");
        assert!(limiter.take("b", start), "each has its own");
    }

    #[test]
    fn however_many_come_the_buckets_stay_few() {
        let limiter = Limiter::new(1);
        let start = Instant::now();
        for who in 0..3 * MAX_BUCKETS {
            assert!(limiter.take(who, start));
        }
        assert!(lock(&limiter.buckets).len() <= MAX_BUCKETS);
    }

    #[test]
    fn places_are_given_back() {
        let connections = Connections::new(3, 2);
        let [one, other, third]: [IpAddr; 3] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|text| text.parse().unwrap());
        let first = connections.enter(one).unwrap();
        let _second = connections.enter(one).unwrap();
        assert_eq!(connections.enter(one).unwrap_err(), TooMany::FromAddress);
        let _third = connections.enter(other).unwrap();
        assert_eq!(connections.enter(third).unwrap_err(), TooMany::All);
        drop(first);
        assert!(connections.enter(third).is_ok());
        assert_eq!(connections.count(), 2);
    }

    #[test]
    fn addresses_of_one_network_are_one_subscriber() {
        let parse = |text: &str| subscriber(text.parse().unwrap());
        assert_eq!(parse("2001:db8:1:2::3"), parse("2001:db8:1:2:ffff::4"));
        assert_ne!(parse("2001:db8:1:2::3"), parse("2001:db8:1:3::3"));
        assert_eq!(parse("::ffff:10.0.0.1"), parse("10.0.0.1"));
        assert_ne!(parse("10.0.0.1"), parse("10.0.0.2"));
    }
}
