//! `syncshell devices`: lists the devices of all groups.

use sync_client::folders::DeviceStatus;

use super::status::age;
use crate::backend::{Backend, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::terminal::clean;

/// List the devices of all groups, how they are connected and when they last were
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let backend = Backend::open(global, Mode::Offline).await?;
        let devices = backend.devices().await;
        backend.close().await;
        let mut devices = devices?;
        let group = global.group();
        devices.devices.retain(|device| group.is_empty() || device.groups.iter().any(|each| each.starts_with(group)));
        let lines: Vec<_> = devices.devices.iter().map(line).collect();
        out.result(lines.join("\n"), &devices)
    }
}

fn line(device: &DeviceStatus) -> String {
    let id = device.device.get(..8).unwrap_or(&device.device);
    let mut text = match &*device.state {
        "this" => format!("{id} {} is this device", clean(&device.name)),
        state => format!("{id} {} is {}", clean(&device.name), clean(state)),
    };
    if let Some(address) = &device.address {
        text += &format!(" at {}", clean(address));
    }
    if let Some(relay) = &device.relayed_by {
        text += &format!(" through the relay {}", clean(relay));
    }
    if let Some(rtt) = device.rtt_us {
        text += &format!(", {}.{} ms away", rtt / 1000, rtt % 1000 / 100);
    }
    if let Some(ago) = device.last_seen_ms {
        text += &format!(", last seen {} ago", age(ago));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_in_one_line() {
        let this = DeviceStatus {
            name: "anna".into(),
            device: "0123456789".into(),
            groups: vec![],
            state: "this".into(),
            address: None,
            relayed_by: None,
            rtt_us: None,
            last_seen_ms: None,
        };
        assert_eq!(line(&this), "01234567 anna is this device");
        let other = DeviceStatus {
            name: "ben\x1b".into(),
            state: "connected".into(),
            address: Some("127.0.0.1:9".into()),
            rtt_us: Some(1234),
            ..this.clone()
        };
        assert_eq!(line(&other), "01234567 ben\u{fffd} is connected at 127.0.0.1:9, 1.2 ms away");
        let relayed = DeviceStatus { address: None, relayed_by: Some("https://relay.example/".into()), ..other };
        assert_eq!(
            line(&relayed),
            "01234567 ben\u{fffd} is connected through the relay https://relay.example/, 1.2 ms away"
        );
        let away =
            DeviceStatus { name: "ben".into(), state: "disconnected".into(), last_seen_ms: Some(90_000), ..this };
        assert_eq!(line(&away), "01234567 ben is disconnected, last seen 90 s ago");
    }
}
