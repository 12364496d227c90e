//! `syncshell run`: keeps a home in sync until it is told to stop.

use std::collections::BTreeSet;
use std::io::Read as _;

use serde::Serialize;
use sync_types::GroupId;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::api::{Event, Overview};
use crate::backend::{Local, Mode, find_server};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::service::Service;
use crate::signals::Stop;
use crate::terminal;

/// Events of all groups that wait to be printed; a slow terminal slows nothing but itself.
const EVENTS: usize = 256;

/// Keep this home in sync until Ctrl-C, and serve other commands on it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also end when standard input ends, for programs that start this one
    #[arg(long)]
    until_eof: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    group: String,
    #[serde(flatten)]
    event: &'a Event,
}

#[derive(Serialize)]
struct Serving<'a> {
    event: &'static str,
    #[serde(flatten)]
    overview: &'a Overview,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let home = global.home()?;
        if let Some(server) = find_server(global, &home).await? {
            return Err(served_by(&server.overview().await?));
        }
        let local = match stop.or(Local::open(global, &home, Mode::Serve)).await {
            Err(failure) if failure.code == "busy" => {
                // it may have begun to serve while we waited, and says more about itself than its lock
                let Some(server) = find_server(global, &home).await? else { return Err(failure) };
                return Err(served_by(&server.overview().await?));
            }
            opened => opened?,
        };
        let result = tokio::select! {
            result = narrate(local.service(), out) => result,
            () = stop.requested() => Ok(()),
            () = local.service().quit().cancelled() => Ok(()),
            () = end_of_input(), if self.until_eof => Ok(()),
        };
        local.close().await;
        out.note("stopped");
        result
    }
}

fn served_by(overview: &Overview) -> Failure {
    let pid = overview.served_by.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
    let message = format!(
        "the home {} is served by {pid} (version {}) already; commands on it go there, so nothing is missing",
        overview.home, overview.version
    );
    Failure::new("busy", message)
}

/// Tells what happens in all groups, those to come included.
async fn narrate(service: &Service, out: Output) -> Result<(), Failure> {
    let overview = service.overview().await?;
    let groups = overview.groups.len();
    let text = format!(
        "serving {} as {} with {groups} {}",
        overview.home,
        terminal::clean(&overview.name),
        if groups == 1 { "group" } else { "groups" }
    );
    for warning in &overview.warnings {
        out.warn(terminal::clean(warning));
    }
    if groups == 0 {
        out.note("it has no group yet: `syncshell pair --create` makes one, `syncshell pair --join` joins one");
    }

    let (sender, mut events) = mpsc::channel(EVENTS);
    let mut readers = JoinSet::new();
    let mut read = BTreeSet::new();
    let mut changed = service.groups_changed();
    // after subscribing, so that whoever reads this line misses nothing that follows
    subscribe(service, &mut read, &mut readers, &sender)?;
    out.result(text, &Serving { event: "serving", overview: &overview })?;
    loop {
        tokio::select! {
            Ok(()) = changed.changed() => subscribe(service, &mut read, &mut readers, &sender)?,
            Some((group, event)) = events.recv() => tell(group, &event, out)?,
        }
    }
}

fn subscribe(
    service: &Service,
    read: &mut BTreeSet<GroupId>,
    readers: &mut JoinSet<()>,
    sender: &mpsc::Sender<(GroupId, Event)>,
) -> Result<(), Failure> {
    for group in service.groups() {
        if !read.insert(group) {
            continue;
        }
        let mut events = service.events(&group.to_string())?;
        let sender = sender.clone();
        readers.spawn(async move {
            while let Some(event) = events.next().await {
                if sender.send((group, event)).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(())
}

fn tell(group: GroupId, event: &Event, out: Output) -> Result<(), Failure> {
    out.object(&Line { group: group.to_string(), event })?;
    let group = group.short();
    match event {
        Event::Connected { name, pending: 0, .. } => {
            out.text(format!("{group} connected to {}", terminal::clean(name)))
        }
        Event::Connected { name, pending, .. } => {
            out.text(format!("{group} connected to {}, handing over {pending}", terminal::clean(name)))
        }
        Event::Disconnected { name, reason, .. } => {
            out.text(format!("{group} lost {}: {}", terminal::clean(name), terminal::clean(reason)))
        }
        Event::Joined { name, author } => {
            let author = author.get(..8).unwrap_or(author);
            out.text(format!("{group} {} has joined as {author}", terminal::clean(name)))
        }
        Event::Error { message, .. } => {
            out.note(format!("{group} {}", terminal::clean(message)));
            Ok(())
        }
        // there may be thousands a second, and a person can pull them
        Event::BlobAvailable { .. } | Event::Lagged { .. } | Event::Unknown => Ok(()),
    }
}

/// Waits for the end of standard input; a failing one has ended too.
async fn end_of_input() {
    let (ended, end) = tokio::sync::oneshot::channel();
    // a thread of its own: the runtime would wait for the read when it ends
    std::thread::spawn(move || {
        let mut ignored = [0; 1024];
        let mut input = std::io::stdin().lock();
        while input.read(&mut ignored).is_ok_and(|length| length > 0) {}
        let _ = ended.send(());
    });
    let _ = end.await;
}
