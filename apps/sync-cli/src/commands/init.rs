//! `syncshell init`: makes a home.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use getrandom::SysRng;
use rand_core::UnwrapErr;
use serde::Serialize;
use sync_client::home::{Home, KeyStoreKind, MAX_PASSPHRASE, PassphraseSource};
use sync_client::{ClientError, Network};
use sync_crypto::passphrase;
use sync_types::bounds::MAX_NAME;
use zeroize::Zeroizing;

use crate::backend::{Local, Mode};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::terminal;

/// Make a home: the directory of this device's key and data
///
/// The key goes to the keychain of the operating system if that works, else into a file sealed
/// under a passphrase that is asked for at the terminal, read from --passphrase-file, or passed as
/// the systemd credential `syncshell.passphrase`. Without any of these this fails: `--key-store
/// file` keeps the key in a file that only you may read.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name by which others know this device; the host's name unless given
    #[arg(long)]
    name: Option<String>,

    /// Where to keep the key: keychain, passphrase or file
    #[arg(long, value_name = "STORE")]
    key_store: Option<KeyStoreKind>,

    /// Also open the group of this name that everyone belongs to who knows its passphrase
    ///
    /// The passphrase is asked for, or read from --group-passphrase-file. An empty answer draws
    /// six words and shows them.
    #[arg(long, value_name = "NAME")]
    passphrase_group: Option<String>,

    /// Never use the public relays of n0, where devices else find each other until a group names a relay
    #[arg(long)]
    no_public_relays: bool,

    /// Go on in a home whose database is gone, with its key and name, as a new device without groups
    #[arg(long, conflicts_with_all = ["name", "key_store", "passphrase_group", "no_public_relays"])]
    anew: bool,

    /// File with the passphrase of that group
    #[arg(long, value_name = "FILE", requires = "passphrase_group")]
    group_passphrase_file: Option<PathBuf>,
}

/// What is used unless it is told otherwise.
const PUBLIC_RELAYS: &str = "Until a group names a relay, devices behind routers find each other through the public relays of \
     n0, which see their addresses and ids; `syncshell relay public off` ends that.";

#[derive(Serialize)]
struct Made {
    home: String,
    name: String,
    key_store: KeyStoreKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    /// Only where it was drawn here: otherwise its person knows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    group_passphrase: Option<String>,
}

impl Args {
    pub(crate) async fn run(self, global: &Global, out: Output) -> Result<(), Failure> {
        let path = global.home()?;
        if self.anew {
            let home = path.display().to_string();
            tokio::task::spawn_blocking(move || Home::begin_anew(&path))
                .await
                .map_err(|error| Failure::new("io", error.to_string()))?
                .map_err(ClientError::from)?;
            return out.result(format!("The home in {home} begins anew"), &serde_json::json!({ "home": home }));
        }
        let name = self.name.clone().unwrap_or_else(host_name);
        // first, because whoever has no good passphrase has no home made either
        let group = self.group_passphrase(&path, &name)?;

        let key_store = make_home(&path, &name, self.key_store, global.passphrase(), out).await?;
        if self.no_public_relays {
            Home::set_public_relays(&path, false).map_err(ClientError::from)?;
        }

        let mut result =
            Made { home: path.display().to_string(), name, key_store, group: None, group_passphrase: None };
        if let Some((group_name, group)) = &group {
            let local = Local::open(global, &path, Mode::Offline).await?;
            let opened = local.service().open_passphrase_group(group_name, &group.passphrase).await;
            local.close().await;
            result.group = Some(opened?);
            result.group_passphrase = group.drawn.then(|| group.passphrase.to_string());
        }
        out.result(text(&result), &result)?;
        if !self.no_public_relays && Network::from_env().public_relays {
            out.note(PUBLIC_RELAYS);
        }
        if group.is_some() {
            out.note("Whoever sees the id of this group, a relay for instance, can try passphrases on it at leisure.");
            out.note("Nobody can be removed from it: whoever knows the passphrase stays in.");
        }
        Ok(())
    }

    fn group_passphrase(&self, home: &Path, name: &str) -> Result<Option<(String, GroupPassphrase)>, Failure> {
        let Some(group) = &self.passphrase_group else { return Ok(None) };
        let found = match &self.group_passphrase_file {
            Some(file) => GroupPassphrase { passphrase: read_passphrase(file)?, drawn: false },
            None if terminal::is_there() => {
                let typed = terminal::ask_twice("Passphrase of the group, empty for one to be drawn: ")
                    .map_err(Failure::io("cannot ask for the passphrase of the group"))?;
                if typed.is_empty() {
                    GroupPassphrase { passphrase: passphrase::generate(&mut UnwrapErr(SysRng)), drawn: true }
                } else {
                    GroupPassphrase { passphrase: typed, drawn: false }
                }
            }
            None => {
                let message = "the passphrase of the group is needed and there is no terminal; \
                               name a file with `--group-passphrase-file`";
                return Err(Failure::usage(message));
            }
        };
        let directory = home.file_name().unwrap_or_default().to_string_lossy();
        if passphrase::check_strength(&found.passphrase, &[group, name, &directory]).is_err() {
            let message = "the passphrase of the group can be guessed; take six unrelated words, \
                           or answer with nothing and have them drawn";
            return Err(Failure::new("weak-passphrase", message));
        }
        Ok(Some((group.clone(), found)))
    }
}

/// Makes a home, and says where its key went.
pub(crate) async fn make_home(
    path: &Path,
    name: &str,
    key_store: Option<KeyStoreKind>,
    source: PassphraseSource,
    out: Output,
) -> Result<KeyStoreKind, ClientError> {
    let (path, name) = (path.to_owned(), name.to_owned());
    let make = move || Home::create(&path, &name, key_store, &source, &mut UnwrapErr(SysRng));
    let (home, warnings) = tokio::task::spawn_blocking(make).await.map_err(|_| ClientError::Closed)??;
    for warning in &warnings {
        out.warn(warning);
    }
    Ok(home.key_store())
}

struct GroupPassphrase {
    passphrase: Zeroizing<String>,
    drawn: bool,
}

fn text(made: &Made) -> String {
    let place = match made.key_store {
        KeyStoreKind::Keychain => "in the keychain of the operating system",
        KeyStoreKind::Passphrase => "in a file under your passphrase",
        KeyStoreKind::File => "in a file",
    };
    let mut text = format!("Made the home of {} in {}; its key is {place}.", made.name, made.home);
    if let Some(group) = &made.group {
        text += &format!("\nIt belongs to the group {group}.");
    }
    if let Some(passphrase) = &made.group_passphrase {
        text += &format!("\nThe passphrase of the group is: {passphrase}");
    }
    text
}

/// The first line of a file, without its end.
pub(crate) fn read_passphrase(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let failed = || format!("the passphrase file {} cannot be read", path.display());
    let mut text = Zeroizing::new(String::with_capacity(MAX_PASSPHRASE + 3));
    let file = File::open(path).map_err(Failure::io(failed()))?;
    let limit = u64::try_from(MAX_PASSPHRASE + 3).unwrap_or(u64::MAX);
    file.take(limit).read_to_string(&mut text).map_err(Failure::io(failed()))?;
    let end = text.strip_suffix('\n').unwrap_or(&text);
    let passphrase = end.strip_suffix('\r').unwrap_or(end);
    match passphrase.len() {
        0 => Err(Failure::usage(format!("the passphrase file {} is empty", path.display()))),
        1..=MAX_PASSPHRASE => Ok(Zeroizing::new(passphrase.to_owned())),
        _ => Err(Failure::usage(format!("the passphrase in {} is longer than {MAX_PASSPHRASE} bytes", path.display()))),
    }
}

/// The host's name, cut to what a device's name may be.
pub(crate) fn host_name() -> String {
    #[cfg(unix)]
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    #[cfg(not(unix))]
    let name = std::env::var("COMPUTERNAME").unwrap_or_default();
    let mut name = terminal::clean(name.trim());
    name.truncate(name.floor_char_boundary(MAX_NAME));
    if name.is_empty() { "this device".to_owned() } else { name }
}
