//! What an operator is shown: numbers, and never of whom.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use sync_types::ErrorCode;

/// Counters since the start.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) connections: Counter,
    pub(crate) sessions: Counter,
    pub(crate) stored: Counter,
    pub(crate) delivered: Counter,
    pub(crate) expired: Counter,
    pub(crate) received_bytes: Counter,
    pub(crate) sent_bytes: Counter,
    /// Envelopes that do not count.
    pub(crate) refused_entries: Counter,
    /// Channels that ended before anyone was known on them.
    pub(crate) broken_handshakes: Counter,
    pub(crate) too_many_connections: Counter,
    pub(crate) too_many_from_address: Counter,
    refusals: [Counter; REFUSALS.len()],
}

/// Refusals that are counted by their reason.
const REFUSALS: [(ErrorCode, &str); 9] = [
    (ErrorCode::Refused, "stranger"),
    (ErrorCode::Protocol, "protocol"),
    (ErrorCode::TooLarge, "too_large"),
    (ErrorCode::GroupFull, "group_full"),
    (ErrorCode::StorageFull, "storage_full"),
    (ErrorCode::TooFast, "too_fast"),
    (ErrorCode::TooManyGroups, "too_many_groups"),
    (ErrorCode::RegistrationNeeded, "registration_needed"),
    (ErrorCode::Unavailable, "unavailable"),
];

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is counted elsewhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) connections: usize,
    pub(crate) relayed_connections: u64,
    pub(crate) relayed_bytes: u64,
    pub(crate) groups: usize,
    pub(crate) database_bytes: u64,
    pub(crate) commits: u64,
    pub(crate) uptime_seconds: u64,
    /// Devices that were woken, could not be, and named nothing of use.
    pub(crate) wakes: [u64; 3],
}

impl Metrics {
    pub(crate) fn refuse(&self, code: ErrorCode) {
        if let Some(at) = REFUSALS.iter().position(|(known, _)| *known == code) {
            self.refusals[at].add(1);
        }
    }

    /// The text that Prometheus reads.
    pub(crate) fn render(&self, now: Now) -> String {
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, values: &[(String, u64)]| {
            // writing to a string cannot fail
            let _ = writeln!(text, "# HELP syncrelay_{name} {help}\n# TYPE syncrelay_{name} {kind}");
            for (labels, value) in values {
                let _ = writeln!(text, "syncrelay_{name}{labels} {value}");
            }
        };
        let plain = |value: u64| vec![(String::new(), value)];
        let count = |value: usize| plain(value as u64);
        metric("connections_total", "counter", "Channels that were opened.", &plain(self.connections.get()));
        metric("connections_active", "gauge", "Connections that are open.", &count(now.connections));
        metric("sessions_total", "counter", "Channels on which a member proved itself.", &plain(self.sessions.get()));
        metric("groups", "gauge", "Groups that are kept.", &count(now.groups));
        metric("blobs_stored_total", "counter", "Envelopes that were stored.", &plain(self.stored.get()));
        metric("blobs_delivered_total", "counter", "Envelopes that were sent.", &plain(self.delivered.get()));
        metric("blobs_expired_total", "counter", "Envelopes that were dropped as old.", &plain(self.expired.get()));
        metric("blobs_refused_total", "counter", "Envelopes that do not count.", &plain(self.refused_entries.get()));
        let bytes = [("received", &self.received_bytes), ("sent", &self.sent_bytes)]
            .map(|(way, counter)| (format!("{{direction=\"{way}\"}}"), counter.get()));
        metric("bytes_total", "counter", "Bytes of frames on all channels.", &bytes);
        metric(
            "relayed_connections_total",
            "counter",
            "Connections of devices that look for a direct way.",
            &plain(now.relayed_connections),
        );
        metric("relayed_bytes_total", "counter", "Bytes that devices sent each other.", &plain(now.relayed_bytes));
        let mut refusals: Vec<_> = REFUSALS
            .iter()
            .zip(&self.refusals)
            .map(|((_, reason), counter)| (format!("{{reason=\"{reason}\"}}"), counter.get()))
            .collect();
        for (reason, counter) in [
            ("too_many_connections", &self.too_many_connections),
            ("too_many_from_address", &self.too_many_from_address),
            ("broken_handshake", &self.broken_handshakes),
        ] {
            refusals.push((format!("{{reason=\"{reason}\"}}"), counter.get()));
        }
        metric("refusals_total", "counter", "What was refused, by reason.", &refusals);
        let wakes: Vec<_> = ["done", "failed", "refused"]
            .iter()
            .zip(now.wakes)
            .map(|(result, count)| (format!("{{result=\"{result}\"}}"), count))
            .collect();
        metric("wakes_total", "counter", "Devices that were to be woken, by what came of it.", &wakes);
        metric("database_bytes", "gauge", "Bytes of the database in use.", &plain(now.database_bytes));
        metric("commits_total", "counter", "Commits, each shared by many pushes.", &plain(now.commits));
        metric("uptime_seconds", "gauge", "Time since the start.", &plain(now.uptime_seconds));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_written_as_prometheus_reads_them() {
        let metrics = Metrics::default();
        metrics.stored.add(3);
        metrics.refuse(ErrorCode::GroupFull);
        let now = Now {
            connections: 2,
            relayed_connections: 4,
            relayed_bytes: 5,
            groups: 1,
            database_bytes: 4096,
            commits: 7,
            uptime_seconds: 9,
            wakes: [1, 2, 3],
        };
        let text = metrics.render(now);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("syncrelay_") && value.parse::<u64>().is_ok(), "{line}");
        }
        for line in [
            "syncrelay_blobs_stored_total 3",
            "syncrelay_connections_active 2",
            "syncrelay_wakes_total{result=\"failed\"} 2",
            "syncrelay_refusals_total{reason=\"group_full\"} 1",
            "syncrelay_refusals_total{reason=\"storage_full\"} 0",
            "# TYPE syncrelay_database_bytes gauge",
        ] {
            assert!(text.lines().any(|each| each == line), "{line} is not in\n{text}");
        }
    }
}
