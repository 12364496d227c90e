//! Our own vectors: every number of sections 3 and 9 of `docs/protocol.md` is computed from the inputs given there.
//!
//! Another implementation can use them, and neither the page nor the code can change alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use data_encoding::HEXLOWER;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use sync_crypto::{
    AuthorSecret, Before, Code, EpochSecret, GroupRoot, History, InviteKeys, Sealer, SignPurpose, Suite, TAG_LEN,
    VaultParams, content, make_rotation, open, open_grant, open_rotation, open_with_passphrase, padded_len, pairing,
    rotation_reaches, seal_grant, seal_with_passphrase, verify,
};
use sync_types::{
    BlobId, Class, Draft, Envelope, EnvelopeHash, EnvelopeType, EpochId, GroupId, Header, Number, Timestamp,
};

const PAGE: &str = include_str!("../../../docs/protocol.md");

/// Randomness of the vectors that need some; not part of the format.
const SEED: [u8; 32] = [7; 32];

/// The lines `name = value` under one heading of section 9.
struct Vectors {
    heading: &'static str,
    lines: BTreeMap<&'static str, &'static str>,
    wrong: String,
}

impl Vectors {
    fn under(heading: &'static str) -> Self {
        let (_, section) = PAGE.split_once("\n## 9. Vectors\n").expect("section 9");
        let (_, part) = section.split_once(&format!("\n### {heading}\n")).expect("heading");
        let part = part.split("\n#").next().unwrap_or_default();
        let lines = part.lines().filter_map(|line| line.split_once(" = ")).collect();
        Self { heading, lines, wrong: String::new() }
    }

    /// An input, or an output to be opened.
    fn text(&mut self, name: &str) -> &'static str {
        self.lines.remove(name).unwrap_or_else(|| panic!("{} has no {name}", self.heading))
    }

    fn bytes(&mut self, name: &str) -> Vec<u8> {
        HEXLOWER.decode(self.text(name).as_bytes()).expect("hex")
    }

    fn array<const N: usize>(&mut self, name: &str) -> [u8; N] {
        self.bytes(name).try_into().expect("length")
    }

    /// An output to be computed.
    fn check(&mut self, name: &str, value: impl AsRef<[u8]>) {
        self.check_text(name, &HEXLOWER.encode(value.as_ref()));
    }

    fn check_text(&mut self, name: &str, value: &str) {
        if self.lines.remove(name) != Some(value) {
            writeln!(self.wrong, "{name} = {value}").expect("memory");
        }
    }

    fn end(self) {
        assert!(self.wrong.is_empty(), "under {}, the code has\n{}", self.heading, self.wrong);
        assert!(self.lines.is_empty(), "under {}, nothing checks {:?}", self.heading, self.lines.keys());
    }
}

fn rng() -> ChaCha20Rng {
    ChaCha20Rng::from_seed(SEED)
}

#[test]
fn padme_table() {
    let (_, section) = PAGE.split_once("### PADMÉ\n").expect("section 3");
    let section = section.split("\n#").next().unwrap_or_default();
    let mut rows = 0;
    for (len, padded) in section.split_whitespace().filter_map(|row| row.split_once('→')) {
        assert_eq!(padded_len(len.parse().expect("number")), padded.parse().expect("number"), "{len}");
        rows += 1;
    }
    assert_eq!(rows, 18);
}

#[test]
fn epoch() {
    let mut page = Vectors::under("Epoch");
    let secret = EpochSecret::from_bytes(page.array("secret"));
    let keys = secret.derive_keys();
    page.check("commitment", secret.commitment());
    page.check("entry key", keys.entry.expose_bytes());
    page.check("slot key", keys.slot.expose_bytes());
    page.check("hint key", keys.hint.expose_bytes());
    page.check("rendezvous secret", keys.rendezvous.expose_bytes());
    page.check("gossip topic", keys.gossip.expose_bytes());
    page.check("link key", keys.link.expose_bytes());
    page.end();
}

#[test]
fn author() {
    let mut page = Vectors::under("Author");
    let author = AuthorSecret::from_bytes(&page.array("secret"));
    let keys = author.keys();
    page.check("verify", keys.verify);
    page.check("noise", keys.noise);
    page.check("blake3(kem)", blake3::hash(&keys.kem[..]).as_bytes());
    let message = page.bytes("message");
    for (name, purpose) in [
        ("as envelope", SignPurpose::Envelope),
        ("as hello", SignPurpose::Hello),
        ("as join", SignPurpose::Join),
        ("as succession", SignPurpose::Succession),
    ] {
        let signature = author.sign(purpose, &[&message]);
        page.check(name, signature);
        assert!(verify(&author.id(), purpose, &[&message], &signature));
    }
    page.end();
}

#[test]
fn content_inside_a_seal() {
    let mut page = Vectors::under("Content");
    let body = page.bytes("body");
    page.check("content", content::encode("app", 1, &body).expect("short"));
    // a compressor is free in what it writes, so this one is only read
    let compressed = content::decode(&page.bytes("compressed")).expect("content");
    assert_eq!((compressed.stream.as_str(), compressed.kind), ("app", 1));
    page.check("its body", compressed.body);
    page.end();
}

#[test]
fn envelope() {
    let mut page = Vectors::under("Envelope");
    let author = AuthorSecret::from_bytes(&Vectors::under("Author").array("secret"));
    let entry = EpochSecret::from_bytes(Vectors::under("Epoch").array("secret")).derive_keys().entry;
    let plaintext = Vectors::under("Content").bytes("content");

    let mut header = Header {
        kind: EnvelopeType::Push,
        sender: author.id(),
        group: GroupId(page.array("group")),
        timestamp: Timestamp(page.text("timestamp").parse().expect("number")),
        nonce: page.array("nonce"),
        blob_id: BlobId(page.array("blob id")),
        number: Number(page.text("number").parse().expect("number")),
        previous: EnvelopeHash(page.array("previous")),
        class: Class::Sealed,
        epoch: EpochId { number: page.text("epoch number").parse().expect("number"), hash: page.array("epoch hash") },
        commitment: [0; 32],
    };
    for (suite, name) in [(Suite::XChaCha20Poly1305, "XChaCha20-Poly1305"), (Suite::Aes256Gcm, "AES-256-GCM")] {
        let sealer = Sealer::new(&entry, suite, &header.nonce);
        header.commitment = sealer.commitment();
        let mut draft = Draft::new(&header, plaintext.len() + TAG_LEN).expect("small");
        let aad = draft.associated_data();
        let (text, tag) = draft.payload_mut().split_at_mut(plaintext.len());
        text.copy_from_slice(&plaintext);
        tag.copy_from_slice(&sealer.seal_in_place(&aad, text));
        let signature = author.sign(SignPurpose::Envelope, &[draft.signed_bytes()]);
        let bytes = draft.sign(&signature);

        let envelope = Envelope::parse(&bytes).expect("own bytes");
        assert!(verify(&author.id(), SignPurpose::Envelope, &[envelope.signed_bytes()], envelope.signature()));
        let opened =
            open(&entry, suite, &header.nonce, &header.commitment, &envelope.associated_data(), envelope.payload());
        assert_eq!(opened.as_deref(), Ok(&plaintext[..]));
        page.check(&format!("commitment, {name}"), header.commitment);
        page.check(&format!("envelope, {name}"), &bytes);
        page.check(&format!("hash, {name}"), envelope.hash());
    }
    page.end();
}

#[test]
fn rotation() {
    let mut page = Vectors::under("Rotation");
    let author = AuthorSecret::from_bytes(&Vectors::under("Author").array("secret"));
    let group = GroupId(page.array("group"));
    let secret_before = EpochSecret::from_bytes(page.array("secret before"));
    let before =
        EpochId { number: page.text("number before").parse().expect("number"), hash: page.array("hash before") };
    let payload = page.bytes("payload");

    let keys = secret_before.derive_keys();
    assert!(rotation_reaches(&payload, &keys.hint, &author.id()));
    let opened = open_rotation(&payload, &group, &author, Some(&keys)).expect("a recipient");
    page.check_text("number", &opened.epoch.number.to_string());
    page.check("hash", opened.epoch.hash);
    page.check("secret", opened.secret.expose_bytes());
    assert_eq!(opened.before, Some((before, secret_before.clone())));

    let before = Before { epoch: before, secret: &secret_before, history: History::Open };
    let made = make_rotation(&group, before, &[author.keys()], &mut rng()).expect("one recipient");
    assert_eq!(HEXLOWER.encode(&made.payload), HEXLOWER.encode(&payload));
    page.end();
}

#[test]
fn grant() {
    let mut page = Vectors::under("Grant");
    let author = AuthorSecret::from_bytes(&Vectors::under("Author").array("secret"));
    let (group, binding) = (GroupId(page.array("group")), page.array("binding"));
    let epoch = EpochId { number: page.text("epoch number").parse().expect("number"), hash: page.array("epoch hash") };
    let epochs = vec![(epoch, EpochSecret::from_bytes(page.array("epoch secret")))];
    let sealed = page.bytes("epochs");
    assert_eq!(open_grant(&group, &binding, &author, &sealed).as_ref(), Ok(&epochs));
    let made = seal_grant(&group, &binding, &author.keys().kem, &epochs, &mut rng()).expect("sound key");
    assert_eq!(HEXLOWER.encode(&made), HEXLOWER.encode(&sealed));
    page.end();
}

#[test]
fn pairing() {
    let mut page = Vectors::under("Pairing");
    let code = Code::parse(page.text("code")).expect("a code");
    page.check("bytes", code.secret_bytes());
    let keys = InviteKeys::derive(&code).expect("memory");
    page.check("PRK", keys.expose_prk());
    page.check("lookup id", keys.lookup_id());
    page.check("invite id", keys.invite_id());
    page.check("verifier", keys.verifier());

    let record = page.bytes("record");
    let plaintext = keys.open_record(&record).expect("own record");
    let (start, zeros) = plaintext.split_at(plaintext.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    assert_eq!(start.len() + zeros.len(), 512);
    page.check("its start", start);
    assert_eq!(HEXLOWER.encode(&keys.seal_record(&plaintext, &mut rng())), HEXLOWER.encode(&record));

    let (binding, invite) = (page.array("binding"), keys.invite_id());
    let author = AuthorSecret::from_bytes(&page.array("author secret"));
    page.check("blake3(author keys)", pairing::keys_hash(&author.keys()));
    let proof = keys.prove_join(&binding, &author.keys());
    page.check("invite proof", proof);
    assert!(pairing::verify_join(&keys.verifier(), &binding, &invite, &author.keys(), &proof));
    let proof = pairing::prove_author(&author, &binding, &invite);
    page.check("author proof", proof);
    assert!(pairing::verify_author(&author.keys(), &binding, &invite, &proof));
    let grant_hash = page.array("grant hash");
    page.check("inviter proof", keys.prove_inviter(&binding, &grant_hash));
    page.end();
}

#[test]
fn passphrase_group() {
    let mut page = Vectors::under("Passphrase group");
    let root = GroupRoot::derive(page.text("passphrase"), page.text("group name")).expect("memory");
    page.check("founder", &root.founder().expose_bytes()[..]);
    page.check("charter nonce", root.charter_nonce());
    page.check("secret of epoch 1", root.first_epoch().expose_bytes());
    page.end();
}

#[test]
fn vault() {
    let mut page = Vectors::under("Vault");
    let passphrase = page.text("passphrase");
    let secret = page.array("secret");
    let vault = page.bytes("vault");
    assert_eq!(open_with_passphrase(passphrase, &vault).as_deref(), Ok(&secret));
    let made = seal_with_passphrase(passphrase, &secret, VaultParams::FLOOR, &mut rng()).expect("within bounds");
    assert_eq!(HEXLOWER.encode(&made), HEXLOWER.encode(&vault));
    page.end();
}
