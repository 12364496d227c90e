//! Backups: what a device needs to take its place in its groups again, sealed under a passphrase or a recovery key.
//!
//! The key that seals a backup is drawn for it alone, and lies in the file in a vault ([`crate::vault`]).

use rand_core::CryptoRng;
use sync_types::bounds::{MAX_ADDRESSES, MAX_CHARTER, MAX_ENVELOPE, MAX_NAME, MAX_RELAYS};
use sync_types::{AuthorId, DeviceId, EpochId, FormatError, Reader, ReplicaId, Timestamp, Writer};
use zeroize::Zeroizing;

use crate::author::{AUTHOR_SECRET_LEN, AuthorSecret};
use crate::epoch::EpochSecret;
use crate::hazmat::kdf::OutOfMemory;
use crate::padme::padded_len;
use crate::passphrase::generate;
use crate::rotation::MAX_EPOCHS;
use crate::seal::{BOX_OVERHEAD, OpenError, open_box, seal_box};
use crate::secret::random;
use crate::vault::{VaultError, VaultParams, open_with_passphrase, seal_with_passphrase};

/// Bytes of a backup: the operations and rotations of many large groups.
pub const MAX_BACKUP: usize = 256 << 20;

/// How every backup begins.
const MAGIC: &str = "syncshell backup";
const VERSION: u64 = 1;
const FIELDS: usize = 4;
const CONTENT_FIELDS: usize = 4;
const GROUP_FIELDS: usize = 7;
const EPOCH_FIELDS: usize = 3;
const PEER_FIELDS: usize = 5;
/// Fields a reader of this version looks through at most.
const MAX_FIELDS: usize = 64;
/// Bytes of a vault.
const MAX_VAULT: usize = 256;
/// Groups of one home.
const MAX_GROUPS: usize = 4096;
/// Authors that one home was in one group: it gets another when it is copied or moved.
const MAX_AUTHORS: usize = 4096;
/// Operations and rotations of one group.
const MAX_ENTRIES: usize = 1 << 20;
/// Replicas that a home has met in one group.
const MAX_PEERS: usize = 1 << 16;
const BACKUP: &str = "backup";

/// What a device takes along.
#[derive(Debug, Clone)]
pub struct Backup {
    /// Name of the device.
    pub name: String,
    /// When the backup was made, by its clock.
    pub made: Timestamp,
    /// Relays of every group.
    pub relays: Vec<String>,
    /// Its groups.
    pub groups: Vec<GroupBackup>,
}

/// A place in one group.
#[derive(Debug, Clone)]
pub struct GroupBackup {
    /// The charter.
    pub charter: Vec<u8>,
    /// The author that writes.
    pub author: AuthorId,
    /// That author and those it was before.
    pub authors: Vec<AuthorSecret>,
    /// Every epoch that was known.
    pub epochs: Vec<EpochBackup>,
    /// Operations and rotations, as they are stored.
    pub entries: Vec<Vec<u8>>,
    /// Relays of this group alone.
    pub relays: Vec<String>,
    /// Where other members were last found.
    pub peers: Vec<PeerBackup>,
}

/// An epoch.
#[derive(Debug, Clone)]
pub struct EpochBackup {
    /// Its name.
    pub id: EpochId,
    /// Its secret.
    pub secret: EpochSecret,
}

/// A device of another member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerBackup {
    /// Its database.
    pub replica: ReplicaId,
    /// The author it proved.
    pub author: AuthorId,
    /// Its device.
    pub device: DeviceId,
    /// Its name.
    pub name: String,
    /// Where it was dialled.
    pub addresses: Vec<String>,
}

/// Why a backup was not made or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// The bytes are none.
    #[error("this is no backup; name a file that `syncshell backup` wrote")]
    NotABackup,
    /// The backup is not as it was written.
    #[error("the backup is damaged; take another copy of it")]
    Damaged,
    /// A newer program made it.
    #[error("the backup is of version {got}, this program reads {known}; update it")]
    UnsupportedVersion {
        /// The version found.
        got: u64,
        /// The version known.
        known: u64,
    },
    /// The passphrase is another one.
    #[error("wrong passphrase or recovery key; try again")]
    WrongPassphrase,
    /// There is more than one backup takes.
    #[error("there is more to back up than {MAX_BACKUP} bytes, the most one backup takes")]
    TooLarge,
    /// The memory is not to be had.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

impl From<VaultError> for BackupError {
    fn from(error: VaultError) -> Self {
        match error {
            VaultError::WrongPassphrase => Self::WrongPassphrase,
            VaultError::OutOfMemory(error) => Self::OutOfMemory(error),
            VaultError::UnsupportedVersion { got, known } => Self::UnsupportedVersion { got, known },
            VaultError::Damaged | VaultError::ParametersOutOfBounds { .. } => Self::Damaged,
        }
    }
}

/// Draws a recovery key: twelve words, to be written down.
#[must_use]
pub fn make_recovery_key(rng: &mut impl CryptoRng) -> Zeroizing<String> {
    let mut key = generate(rng);
    // one growth, which would leave a copy of the first half behind
    let mut whole = Zeroizing::new(String::with_capacity(2 * key.capacity()));
    whole.push_str(&key);
    whole.push(' ');
    key = generate(rng);
    whole.push_str(&key);
    whole
}

/// Whether bytes begin like a backup.
#[must_use]
pub fn is_backup(bytes: &[u8]) -> bool {
    let mut reader = Reader::new(bytes);
    reader.array("backup", FIELDS, MAX_FIELDS).is_ok() && reader.text("magic", MAGIC.len()).is_ok_and(|it| it == MAGIC)
}

/// Seals a backup under a passphrase or a recovery key.
///
/// # Errors
/// When it is too large, or the memory to stretch the passphrase is not to be had.
pub fn seal_backup(
    backup: &Backup,
    passphrase: &str,
    params: VaultParams,
    rng: &mut impl CryptoRng,
) -> Result<Vec<u8>, BackupError> {
    let content = encode(backup);
    if content.len() > MAX_BACKUP - MAX_BACKUP / 4 {
        return Err(BackupError::TooLarge);
    }
    let key = Zeroizing::new(random(rng));
    let vault = seal_with_passphrase(&normalised(passphrase), &key, params, rng)?;
    let mut header = Writer::array_of(FIELDS);
    header.text(MAGIC).uint(VERSION).bin(&vault);
    let header = header.finish();
    let sealed = seal_box(&key, BACKUP, &header, &content, rng);
    let mut file = Writer::default();
    file.raw(&header).bin(&sealed);
    Ok(file.finish())
}

/// Opens what [`seal_backup`] sealed.
///
/// # Errors
/// When it is no backup, a damaged one or of a later version, or the passphrase is another.
pub fn open_backup(passphrase: &str, bytes: &[u8]) -> Result<Backup, BackupError> {
    if !is_backup(bytes) {
        return Err(BackupError::NotABackup);
    }
    let (header, vault, sealed) = parse(bytes)?;
    let key = open_with_passphrase(&normalised(passphrase), vault)?;
    let content = open_box(&key, BACKUP, header, sealed).map_err(|error| match error {
        OpenError::WrongKey | OpenError::Forged => BackupError::Damaged,
    })?;
    decode(&content).map_err(|_| BackupError::Damaged)
}

/// What is typed by hand may have other blanks.
fn normalised(passphrase: &str) -> Zeroizing<String> {
    let mut one = Zeroizing::new(String::with_capacity(passphrase.len()));
    for word in passphrase.split_whitespace() {
        if !one.is_empty() {
            one.push(' ');
        }
        one.push_str(word);
    }
    one
}

type Parsed<'a> = (&'a [u8], &'a [u8], &'a [u8]);

fn parse(bytes: &[u8]) -> Result<Parsed<'_>, BackupError> {
    let damaged = |_: FormatError| BackupError::Damaged;
    let mut reader = Reader::new(bytes);
    let fields = reader.array("backup", FIELDS, MAX_FIELDS).map_err(damaged)?;
    reader.text("magic", MAGIC.len()).map_err(damaged)?;
    let got = reader.uint("version").map_err(damaged)?;
    if got != VERSION {
        return Err(BackupError::UnsupportedVersion { got, known: VERSION });
    }
    let vault = reader.bin("vault", MAX_VAULT).map_err(damaged)?;
    let header = &bytes[..bytes.len() - reader.rest().len()];
    let sealed = reader.bin("content", MAX_BACKUP + BOX_OVERHEAD).map_err(damaged)?;
    reader.skip("later field", fields - FIELDS).map_err(damaged)?;
    reader.end().map_err(damaged)?;
    Ok((header, vault, sealed))
}

fn encode(backup: &Backup) -> Zeroizing<Vec<u8>> {
    let mut writer = Writer::array_of(CONTENT_FIELDS);
    writer.text(&backup.name).uint(backup.made.0).texts(&backup.relays).array(backup.groups.len());
    for group in &backup.groups {
        writer.array(GROUP_FIELDS).bin(&group.charter).bin(&group.author.0).array(group.authors.len());
        for author in &group.authors {
            writer.bin(&author.expose_bytes()[..]);
        }
        writer.array(group.epochs.len());
        for EpochBackup { id, secret } in &group.epochs {
            writer.array(EPOCH_FIELDS).uint(id.number.into()).bin(&id.hash).bin(secret.expose_bytes());
        }
        writer.bins(&group.entries).texts(&group.relays).array(group.peers.len());
        for peer in &group.peers {
            writer.array(PEER_FIELDS).bin(&peer.replica.0).bin(&peer.author.0).bin(&peer.device.0);
            writer.text(&peer.name).texts(&peer.addresses);
        }
    }
    let mut content = Zeroizing::new(writer.finish());
    let padded = padded_len(u64::try_from(content.len()).expect("BUG: a length fits 64 bits"));
    content.resize(usize::try_from(padded).expect("BUG: padding adds an eighth at most"), 0);
    content
}

fn decode(bytes: &[u8]) -> Result<Backup, FormatError> {
    let mut reader = Reader::new(bytes);
    let fields = reader.array("backup content", CONTENT_FIELDS, MAX_FIELDS)?;
    let name = reader.text("name", MAX_NAME)?.to_owned();
    let made = Timestamp(reader.uint("time")?);
    let relays = reader.texts("relays", MAX_RELAYS)?;
    let count = reader.array("groups", 0, MAX_GROUPS)?;
    let groups = (0..count).map(|_| read_group(&mut reader)).collect::<Result<_, _>>()?;
    reader.skip("later field", fields - CONTENT_FIELDS)?;
    // padding
    if reader.rest().iter().any(|&byte| byte != 0) {
        return Err(FormatError::Trailing(reader.rest().len()));
    }
    Ok(Backup { name, made, relays, groups })
}

fn read_group(reader: &mut Reader<'_>) -> Result<GroupBackup, FormatError> {
    let fields = reader.array("group", GROUP_FIELDS, MAX_FIELDS)?;
    let charter = reader.bin("charter", MAX_CHARTER)?.to_vec();
    let author = AuthorId(reader.fixed("author")?);
    let count = reader.array("authors", 1, MAX_AUTHORS)?;
    let authors = (0..count)
        .map(|_| {
            let secret = Zeroizing::new(reader.fixed::<AUTHOR_SECRET_LEN>("author's secrets")?);
            Ok(AuthorSecret::from_bytes(&secret))
        })
        .collect::<Result<_, FormatError>>()?;
    let count = reader.array("epochs", 1, MAX_EPOCHS)?;
    let epochs = (0..count).map(|_| read_epoch(reader)).collect::<Result<_, _>>()?;
    let entries = reader.bins("entries", MAX_ENTRIES, MAX_ENVELOPE)?;
    let relays = reader.texts("relays", MAX_RELAYS)?;
    let count = reader.array("peers", 0, MAX_PEERS)?;
    let peers = (0..count).map(|_| read_peer(reader)).collect::<Result<_, _>>()?;
    reader.skip("later field", fields - GROUP_FIELDS)?;
    Ok(GroupBackup { charter, author, authors, epochs, entries, relays, peers })
}

fn read_epoch(reader: &mut Reader<'_>) -> Result<EpochBackup, FormatError> {
    let fields = reader.array("epoch", EPOCH_FIELDS, MAX_FIELDS)?;
    let id = EpochId { number: reader.uint32("epoch number")?, hash: reader.fixed("epoch hash")? };
    let secret = EpochSecret::from_bytes(reader.fixed("epoch secret")?);
    reader.skip("later field", fields - EPOCH_FIELDS)?;
    Ok(EpochBackup { id, secret })
}

fn read_peer(reader: &mut Reader<'_>) -> Result<PeerBackup, FormatError> {
    let fields = reader.array("peer", PEER_FIELDS, MAX_FIELDS)?;
    let replica = ReplicaId(reader.fixed("replica")?);
    let author = AuthorId(reader.fixed("author")?);
    let device = DeviceId(reader.fixed("device")?);
    let name = reader.text("name", MAX_NAME)?.to_owned();
    let addresses = reader.texts("addresses", MAX_ADDRESSES)?;
    reader.skip("later field", fields - PEER_FIELDS)?;
    Ok(PeerBackup { replica, author, device, name, addresses })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng as _;

    use super::*;

    fn rng() -> ChaCha20Rng {
        ChaCha20Rng::seed_from_u64(7)
    }

    fn backup() -> Backup {
        let author = AuthorSecret::make(&mut rng());
        let epoch = EpochBackup { id: EpochId { number: 1, hash: [3; 32] }, secret: EpochSecret::make(&mut rng()) };
        let peer = PeerBackup {
            replica: ReplicaId([4; ReplicaId::LEN]),
            author: AuthorId([5; 32]),
            device: DeviceId([6; 32]),
            name: "phone".to_owned(),
            addresses: vec!["192.0.2.1:7".to_owned()],
        };
        let group = GroupBackup {
            charter: b"charter".to_vec(),
            author: author.id(),
            authors: vec![author],
            epochs: vec![epoch],
            entries: vec![b"operation".to_vec(), b"rotation".to_vec()],
            relays: vec!["https://relay.example/#KEY".to_owned()],
            peers: vec![peer],
        };
        Backup { name: "laptop".to_owned(), made: Timestamp(9), relays: Vec::new(), groups: vec![group] }
    }

    fn sealed() -> Vec<u8> {
        seal_backup(&backup(), "six words", VaultParams::FLOOR, &mut rng()).expect("sealed")
    }

    #[test]
    fn what_was_sealed_opens_with_its_passphrase_and_no_other() {
        let sealed = sealed();
        assert!(is_backup(&sealed));
        let opened = open_backup("  six   words\n", &sealed).expect("opened");
        assert_eq!(encode(&opened)[..], encode(&backup())[..]);
        assert_eq!(open_backup("six word", &sealed).err(), Some(BackupError::WrongPassphrase));
        assert_eq!(open_backup("six words", b"a thesis").err(), Some(BackupError::NotABackup));
    }

    #[test]
    fn its_length_and_bytes_tell_nothing_of_what_is_in_it() {
        let mut more = backup();
        more.name.push('s');
        let more = seal_backup(&more, "six words", VaultParams::FLOOR, &mut rng()).expect("sealed");
        assert_eq!(more.len(), sealed().len());
        for secret in [&b"laptop"[..], b"192.0.2.1", b"relay.example", &backup().groups[0].author.0] {
            assert!(!sealed().windows(secret.len()).any(|window| window == secret));
        }
    }

    #[test]
    fn a_backup_of_a_later_version_says_so() {
        let mut later = sealed();
        let version = 2 + MAGIC.len();
        assert_eq!(u64::from(later[version]), VERSION);
        later[version] = 2;
        assert_eq!(
            open_backup("six words", &later).err(),
            Some(BackupError::UnsupportedVersion { got: 2, known: VERSION })
        );
    }

    #[test]
    fn a_recovery_key_has_twelve_words_and_another_each_time() {
        let mut rng = rng();
        let keys = [make_recovery_key(&mut rng), make_recovery_key(&mut rng)];
        assert_ne!(keys[0], keys[1]);
        assert!(keys.iter().all(|key| key.split(' ').count() == 12));
    }

    #[test]
    fn content_is_laid_out_as_it_always_was() {
        let content = encode(&backup());
        assert_eq!(
            blake3::hash(&content).to_hex().as_str(),
            "73fa0475524907e63dca95ba0ac2ad23a3da102bddb2f4f13ec4c9dfc4835323"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_changed_or_cut_backup_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<bool>()) {
            let mut bytes = sealed();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
            prop_assert!(open_backup("six words", &bytes).is_err());
        }

        #[test]
        fn any_content_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(backup) = decode(&bytes) {
                prop_assert!(decode(&encode(&backup)).is_ok());
            }
        }
    }
}
