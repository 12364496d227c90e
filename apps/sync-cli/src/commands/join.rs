//! `syncshell join`: gets into a group, and gives its folder a place.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use sync_client::folders::Offered;
use sync_types::folder::TreePath;
use tokio::time::Instant;

use super::pair::{At, given_or_read, join_group};
use super::share::{Placed, absolute};
use crate::api::PlaceRequest;
use crate::backend::{Backend, Mode};
use crate::cli::{Global, Ways};
use crate::exit::Failure;
use crate::live;
use crate::output::Output;
use crate::signals::Stop;
use crate::terminal;

/// How long to wait for a member to announce a folder: it comes with the first entries, once connected.
const ANNOUNCED_WITHIN: Duration = Duration::from_secs(60);

/// Time after which it is said once more what is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Digits of a group's id that are no code: a group of this home is named by at least so many.
const GROUP_DIGITS: usize = 4;

/// Join by a code or link, and sync the folder it is for into a directory here
///
/// What is in the directory already is compared first: equal files are not transferred, of
/// different ones both are kept. If nobody else serves the home, this goes on to keep the folder in
/// sync until Ctrl-C.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The code or link, read from standard input if -; or the first digits of the id of a group
    /// this home is in, to place a further folder of it
    #[arg(value_name = "CODE|LINK|GROUP")]
    invite: String,

    /// Where to put it; a new directory here, called like the folder, unless given
    #[arg(value_name = "FOLDER")]
    path: Option<PathBuf>,

    /// Which one, by its name or the first digits of its id, where the group has several
    #[arg(long, value_name = "NAME")]
    folder: Option<String>,

    #[command(flatten)]
    ways: Ways,

    #[command(flatten)]
    at: At,
}

#[derive(Serialize)]
struct JoinedLine<'a> {
    event: &'static str,
    group: &'a str,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let mut stop = Stop::listen()?;
        let invite = stop.or(given_or_read(&self.invite, "Code or link: ")).await?;
        let backend = stop.or(Backend::open(global, Mode::Serve)).await?;
        let result = self.join(&backend, &invite, &mut stop, out).await;
        backend.close().await;
        result
    }

    async fn join(&self, backend: &Backend, invite: &str, stop: &mut Stop, out: Output) -> Result<(), Failure> {
        if let Some(path) = &self.path {
            may_be_placed(backend, &absolute(path)?).await?;
        }
        let group = match own_group(backend, invite).await? {
            Some(group) => group,
            None => {
                let joined = join_group(backend, invite, &self.at.relays, stop, out).await?;
                out.result(
                    format!("joined group {}", joined.group),
                    &JoinedLine { event: "joined", group: &joined.group },
                )?;
                joined.group
            }
        };
        let placed = tokio::select! {
            placed = self.place(backend, &group, out) => placed,
            () = stop.requested() => Err(Failure::new("interrupted", "broken off before the folder had a place")),
        };
        placed.map_err(|failure| {
            let again =
                format!("; this home is in the group, `syncshell join {} [FOLDER]` goes on from here", short(&group));
            Failure { message: failure.message + &again, ..failure }
        })?;
        if backend.is_local() {
            out.note("keeping it in sync until Ctrl-C; `syncshell up` does so in the background");
            live::watch(backend, stop, out).await?;
        }
        Ok(())
    }

    async fn place(&self, backend: &Backend, group: &str, out: Output) -> Result<(), Failure> {
        let offered = self.wait_for_offer(backend, group, out).await?;
        let path = match &self.path {
            Some(path) => absolute(path)?,
            None => default_place(&offered.name)?,
        };
        let request = PlaceRequest { path, name: None, direction: self.ways.direction() };
        out.note(format!("putting {} into {}", terminal::clean(&offered.name), request.path.display()));
        let folder = backend.place(group, &offered.id, request).await?;
        let text = format!("{} is in {}", terminal::clean(&folder.name), folder.path.display());
        out.result(text, &Placed::new("placed", &folder))
    }

    /// The folder that is meant, once a member has announced it.
    async fn wait_for_offer(&self, backend: &Backend, group: &str, out: Output) -> Result<Offered, Failure> {
        let give_up = Instant::now() + ANNOUNCED_WITHIN;
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            let offered = backend.offered(group, PATIENCE.min(left)).await?.offered;
            if let Some(found) = choose(&offered, self.folder.as_deref())? {
                if offered.len() > 1 {
                    let names: Vec<_> = offered.iter().map(|each| terminal::clean(&each.name)).collect();
                    out.note(format!("the group has the folders {}; --folder chooses one", names.join(", ")));
                }
                return Ok(found.clone());
            }
            if left.is_zero() {
                let what =
                    self.folder.as_deref().map_or_else(|| "a folder".to_owned(), |name| format!("the folder {name}"));
                let seconds = ANNOUNCED_WITHIN.as_secs();
                return Err(Failure::new("no-folder", format!("no member has announced {what} within {seconds} s")));
            }
            if !offered.is_empty() {
                // others are there, and the one that is meant may come
                tokio::time::sleep(PATIENCE.min(left)).await;
            }
            out.note("waiting until a device that has the folder is connected and announces it");
        }
    }
}

/// The folder that is meant; none if it is not there yet.
fn choose<'a>(offered: &'a [Offered], wanted: Option<&str>) -> Result<Option<&'a Offered>, Failure> {
    let Some(wanted) = wanted else {
        // the first one without a place, or one whose place the engine can name
        return Ok(offered.iter().find(|each| each.path.is_none()).or(offered.first()));
    };
    let named: Vec<_> = offered.iter().filter(|each| each.name == wanted).collect();
    let by_id = || offered.iter().filter(|each| each.id.starts_with(&wanted.to_ascii_lowercase())).collect();
    let found = if named.is_empty() { by_id() } else { named };
    match found[..] {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        _ => {
            let message = format!("{} folders are called {wanted}; name the first digits of its id", found.len());
            Err(Failure::new("several-folders", message))
        }
    }
}

/// A group of this home, if that is what was named.
async fn own_group(backend: &Backend, text: &str) -> Result<Option<String>, Failure> {
    if text.len() < GROUP_DIGITS || !text.chars().all(|c| c.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let prefix = text.to_ascii_lowercase();
    let groups = backend.overview().await?.groups;
    let mut named = groups.into_iter().map(|group| group.group).filter(|group| group.starts_with(&prefix));
    match (named.next(), named.next()) {
        (Some(_), Some(_)) => {
            Err(Failure::new("several-groups", format!("several groups begin with {text}; name more digits")))
        }
        (found, _) => Ok(found),
    }
}

/// Refuses before the invite is used what would be refused after.
async fn may_be_placed(backend: &Backend, path: &Path) -> Result<(), Failure> {
    for folder in backend.folders().await?.folders {
        if path.starts_with(&folder.path) || folder.path.starts_with(path) {
            let (path, other) = (path.display(), folder.path.display());
            let message =
                format!("{path} overlaps with {other}, which is synced already; choose a directory outside of it");
            return Err(Failure::new("folder-overlaps", message));
        }
    }
    Ok(())
}

/// A new directory here. Its name was chosen by somebody else: what is here already is taken only when named.
fn default_place(name: &str) -> Result<PathBuf, Failure> {
    let plain = TreePath::new(name).is_ok_and(|path| path.components().count() == 1)
        && !name.starts_with('.')
        && !name.contains(['\\', ':'])
        && terminal::clean(name) == name;
    if !plain {
        let message = format!(
            "the folder is called {:?}, which is no name for a directory; say where to put it",
            terminal::clean(name)
        );
        return Err(Failure::new("bad-path", message));
    }
    let path = absolute(Path::new(name))?;
    match std::fs::read_dir(&path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(path),
        _ => {
            let message = format!("{} is here already; name it if the folder is to be put there", path.display());
            Err(Failure::new("exists", message))
        }
    }
}

fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_chosen_by_somebody_else_leads_nowhere_but_here() {
        for name in
            ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "c:", ".ssh", ".syncshell", "a\nb", "a\u{202e}b", "a\0"]
        {
            assert_eq!(
                default_place(name).map_err(|failure| failure.code.into_owned()),
                Err("bad-path".to_owned()),
                "{name:?}"
            );
        }
        let here = std::env::current_dir().expect("a directory").canonicalize().expect("there");
        assert_eq!(default_place("Photos 2026").ok(), Some(here.join("Photos 2026")));
        // the crate's own sources
        assert_eq!(default_place("src").map_err(|failure| failure.code.into_owned()), Err("exists".to_owned()));
    }

    #[test]
    fn of_several_folders_the_first_without_a_place_is_meant_unless_one_is_named() {
        let offer = |id: &str, name: &str, path: Option<&str>| Offered {
            id: id.into(),
            name: name.into(),
            path: path.map(Into::into),
        };
        let offered = [offer("aa1", "one", Some("/one")), offer("aa2", "two", None), offer("bb3", "two", None)];
        let chosen = |wanted: Option<&str>| {
            choose(&offered, wanted)
                .map(|found| found.map(|each| each.id.clone()))
                .map_err(|failure| failure.code.into_owned())
        };
        assert_eq!(chosen(None), Ok(Some("aa2".into())));
        assert_eq!(chosen(Some("one")), Ok(Some("aa1".into())));
        assert_eq!(chosen(Some("BB")), Ok(Some("bb3".into())));
        assert_eq!(chosen(Some("two")), Err("several-folders".into()));
        assert_eq!(chosen(Some("three")), Ok(None));
        assert!(choose(&offered[..1], None).is_ok_and(|found| found.is_some()), "the engine says where it is");
    }
}
