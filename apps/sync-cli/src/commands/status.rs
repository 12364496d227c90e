//! `syncshell status`: shows a home, its groups and whom it knows.

use std::fmt::Write as _;

use sync_client::folders::{Direction, FolderStatus, PathProblem, Watching};
use sync_client::{PeerStatus, RelayStatus, Status, SyncState};

use crate::api::Overview;
use crate::backend::{Backend, Mode, find_server};
use crate::cli::Global;
use crate::exit::Failure;
use crate::live::{self, Rate, in_words};
use crate::output::Output;
use crate::signals::Stop;
use crate::terminal::clean;

/// Show this home: its folders, what is not in sync and why, its groups and their devices
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Go on and show what happens until Ctrl-C
    #[arg(long)]
    follow: bool,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        if self.follow {
            return follow(global, out).await;
        }
        let backend = Backend::open(global, Mode::Offline).await?;
        let overview = backend.overview().await;
        backend.close().await;
        let mut overview = overview?;
        overview.groups.retain(|group| group.group.starts_with(global.group()));
        if overview.groups.is_empty() && !global.group().is_empty() {
            return Err(Failure::new("unknown-group", format!("this home has no group {}", global.group())));
        }
        overview.folders.retain(|folder| folder.group.starts_with(global.group()));
        out.result(text(&overview).trim_end(), &overview)
    }
}

async fn follow(global: &Global, out: Output) -> Result<(), Failure> {
    let mut stop = Stop::listen()?;
    let home = global.home()?;
    let Some(server) = stop.or(find_server(global, &home)).await? else {
        let message = "nobody serves this home, so nothing happens in it; `syncshell run` or `syncshell up` does";
        return Err(Failure::new("not-served", message));
    };
    live::watch(&Backend::Remote(server), &mut stop, out).await
}

fn text(overview: &Overview) -> String {
    let served = match overview.served_by {
        Some(pid) => format!("served by process {pid}"),
        None => "not served; `syncshell run` keeps it in sync".to_owned(),
    };
    let mut text =
        format!("home    {} ({served})\ndevice  {} {}\n", overview.home, clean(&overview.name), overview.device);
    for warning in &overview.warnings {
        line(&mut text, format_args!("warning {}", clean(warning)));
    }
    if overview.groups.is_empty() {
        text += "no group yet; `syncshell share FOLDER` makes one, `syncshell join CODE` joins one\n";
    }
    for folder in &overview.folders {
        add_folder(&mut text, folder);
    }
    for group in &overview.groups {
        add_group(&mut text, group);
    }
    text
}

fn add_folder(text: &mut String, folder: &FolderStatus) {
    line(text, format_args!("\nfolder  {}", in_words(folder, Rate::default())));
    line(
        text,
        format_args!("  in {}, group {}", folder.path.display(), folder.group.get(..8).unwrap_or(&folder.group)),
    );
    match folder.direction {
        Direction::SendOnly => line(text, format_args!("  send-only: changes of others are not taken")),
        Direction::ReceiveOnly => line(text, format_args!("  receive-only: changes made here are not told")),
        _ => {}
    }
    if !folder.selected.is_empty() {
        line(text, format_args!("  takes {}; `syncshell select` chooses", clean(&folder.selected.join(", "))));
    }
    if folder.watching == Watching::Rescans {
        let why = folder.unwatched.as_deref().map(|why| format!(": {}", clean(why))).unwrap_or_default();
        line(text, format_args!("  changes are found by rescans, `syncshell rescan` looks at once{why}"));
    }
    for PathProblem { path, problem } in &folder.problems {
        line(text, format_args!("  not in sync: {}: {}", clean(path), clean(problem)));
    }
    for path in &folder.conflicts {
        line(text, format_args!("  conflict, both are kept: {}", clean(path)));
    }
}

fn add_group(text: &mut String, group: &Status) {
    let state = match group.state {
        SyncState::Synced => "synced",
        SyncState::Pending => "pending",
        SyncState::Offline => "offline",
        _ => "in a state of a later version",
    };
    line(text, format_args!("\ngroup   {}", group.group));
    line(text, format_args!("  {state}; cursor {}, {} to hand over", group.max_cursor, group.pending));
    line(text, format_args!("  {} authors, this one {}", group.authors, group.author));
    for peer in &group.peers {
        line(text, format_args!("  {}", peer_line(peer)));
    }
    for relay in &group.relays {
        line(text, format_args!("  {}", relay_line(relay)));
    }
    for gap in &group.gaps {
        line(text, format_args!("  missing {} to {} of {}", gap.first, gap.last, gap.author));
    }
    for fork in &group.forks {
        line(text, format_args!("  two entries {} of {}: a home was copied or restored", fork.number, fork.author));
    }
    if group.refused > 0 {
        line(text, format_args!("  {} refused", group.refused));
    }
    for warning in &group.warnings {
        line(text, format_args!("  warning {}", clean(warning)));
    }
}

fn peer_line(peer: &PeerStatus) -> String {
    let name = if peer.name.is_empty() { peer.device.get(..8).unwrap_or(&peer.device) } else { &peer.name };
    let mut text = format!("{} is {}", clean(name), clean(&peer.state));
    if let Some(address) = &peer.address {
        text += &format!(" at {}", clean(address));
    }
    if let Some(relay) = &peer.relayed_by {
        text += &format!(" through the relay {}", clean(relay));
    }
    if let Some(rtt) = peer.rtt_us {
        text += &format!(", {}.{} ms away", rtt / 1000, rtt % 1000 / 100);
    }
    text += &format!(", has up to cursor {}", peer.acknowledged);
    if let Some(ago) = peer.last_seen_ms {
        text += &format!(", last seen {} ago", age(ago));
    }
    if peer.address.is_none() && peer.relayed_by.is_none() && !peer.addresses.is_empty() {
        let known = peer.addresses_age_ms.map(|ago| format!(" {} ago", age(ago))).unwrap_or_default();
        text += &format!(", known{known} at {}", clean(&peer.addresses.join(" ")));
    }
    text
}

fn relay_line(relay: &RelayStatus) -> String {
    let mut text = format!("relay {} is {}", clean(&relay.url), clean(&relay.state));
    text += &format!(", has up to cursor {}", relay.acknowledged);
    if let Some(ago) = relay.last_seen_ms {
        text += &format!(", last seen {} ago", age(ago));
    }
    match &relay.problem {
        Some(problem) => text + &format!(": {}", clean(problem)),
        None => text + "; it keeps entries, and files' contents come from devices alone",
    }
}

/// A time span in its largest unit.
pub(super) fn age(millis: u64) -> String {
    match millis / 1000 {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // writing to a string cannot fail
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use sync_client::{Fork, Gap};

    use super::*;

    #[test]
    fn a_home_is_shown_with_what_is_wrong_in_it() {
        let peer = PeerStatus {
            name: "ben\x1b".into(),
            device: "bb".into(),
            author: "cc".into(),
            state: "connected".into(),
            address: Some("127.0.0.1:9".into()),
            relayed_by: None,
            addresses: vec!["127.0.0.1:9".into()],
            addresses_age_ms: Some(1),
            rtt_us: Some(1234),
            acknowledged: 6,
            last_seen_ms: None,
        };
        let away = PeerStatus {
            name: String::new(),
            device: "0123456789".into(),
            state: "reconnecting".into(),
            address: None,
            addresses_age_ms: Some(300_000),
            rtt_us: None,
            last_seen_ms: Some(90_000_000),
            ..peer.clone()
        };
        let relayed = PeerStatus {
            name: "cleo".into(),
            address: None,
            relayed_by: Some("https://relay.example:7841/".into()),
            rtt_us: Some(34_567),
            ..peer.clone()
        };
        let relay = RelayStatus {
            url: "ws://relay.example:7841/#KEY".into(),
            state: "connected".into(),
            acknowledged: 7,
            last_seen_ms: Some(2_000),
            problem: None,
        };
        let group = Status {
            group: "ab".into(),
            author: "aa".into(),
            member: "aa".into(),
            device: "dd".into(),
            name: "anna".into(),
            max_cursor: 7,
            pending: 1,
            state: SyncState::Pending,
            peers: vec![peer, relayed, away],
            relays: vec![relay.clone(), RelayStatus { problem: Some("it is full".into()), ..relay }],
            authors: 3,
            gaps: vec![Gap { author: "cc".into(), first: 2, last: 4 }],
            forks: vec![Fork { author: "cc".into(), number: 5 }],
            refused: 2,
            warnings: vec![],
        };
        let folder = FolderStatus {
            direction: Direction::ReceiveOnly,
            selected: vec!["2026".into(), "old/best".into()],
            watching: Watching::Rescans,
            unwatched: Some("the table is full".into()),
            problems: vec![PathProblem { path: "a\nb".into(), problem: "it may not be read".into() }],
            conflicts: vec!["x (conflict 2026-11-21 AB12CD).txt".into()],
            ..crate::select::tests::folder("ff", "photos", std::path::Path::new("/photos"))
        };
        let overview = Overview {
            version: "1".into(),
            served_by: Some(12),
            home: "/h".into(),
            name: "anna".into(),
            device: "dd".into(),
            warnings: vec!["no mDNS".into()],
            api: None,
            groups: vec![group],
            folders: vec![folder],
        };
        expect![[r#"
            home    /h (served by process 12)
            device  anna dd
            warning no mDNS

            folder  photos: up to date, 0 files, 0 B; 0 files and 0 B are left out here; 1 path is not in sync
              in /photos, group abababab
              receive-only: changes made here are not told
              takes 2026, old/best; `syncshell select` chooses
              changes are found by rescans, `syncshell rescan` looks at once: the table is full
              not in sync: a�b: it may not be read
              conflict, both are kept: x (conflict 2026-11-21 AB12CD).txt

            group   ab
              pending; cursor 7, 1 to hand over
              3 authors, this one aa
              ben� is connected at 127.0.0.1:9, 1.2 ms away, has up to cursor 6
              cleo is connected through the relay https://relay.example:7841/, 34.5 ms away, has up to cursor 6
              01234567 is reconnecting, has up to cursor 6, last seen 25 h ago, known 5 min ago at 127.0.0.1:9
              relay ws://relay.example:7841/#KEY is connected, has up to cursor 7, last seen 2 s ago; it keeps entries, and files' contents come from devices alone
              relay ws://relay.example:7841/#KEY is connected, has up to cursor 7, last seen 2 s ago: it is full
              missing 2 to 4 of cc
              two entries 5 of cc: a home was copied or restored
              2 refused
        "#]]
        .assert_eq(&text(&overview));
    }
}
