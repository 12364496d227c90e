//! What is done to a group: drawn from a seed, written down, and replayed without drawing again.

use rand_core::Rng;
use serde::{Deserialize, Serialize};

use crate::random::{below, chance, derive, index};
use crate::tree::{Edit, Trouble};
use crate::vfs::Survive;

/// Replicas of the largest group.
const MAX_REPLICAS: usize = 6;
/// Longest pause between two actions in ms: several round trips, so that sessions get somewhere.
const MAX_WAIT: u64 = 250;
/// Days a clock jumps at most.
const YEAR: i64 = 365;

/// A run as it was drawn, and all that a replay needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recording {
    /// What everything else is drawn from: keys, contents, delays, what survives.
    pub seed: u64,
    /// Places for replicas; the first one founds the group.
    pub replicas: usize,
    /// Places, from the first, that belong to the group when it starts.
    pub joined: usize,
    /// Whether there is a liar, and whether it was admitted.
    pub liar: Option<Liar>,
    /// Whether the group has a folder.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub folders: bool,
    /// What is done.
    pub steps: Vec<Step>,
    /// The invariant this run broke when it was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broke: Option<String>,
}

/// What the liar is to the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Liar {
    /// Nobody admitted it.
    Stranger,
    /// It was admitted and has the group's keys.
    Member,
}

/// A pause and what is done after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Names the step, also after others were taken out; what it draws depends on it.
    pub id: u64,
    /// Virtual ms before it.
    pub wait: u64,
    /// What is done.
    #[serde(flatten)]
    pub action: Action,
}

/// One thing that is done; it is passed over where it makes no sense, such as a push at a place that is down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
#[expect(missing_docs, reason = "what a variant says names its fields")]
pub enum Action {
    /// The app pushes blobs of these sizes at once, after what failed before.
    Push { at: usize, sizes: Vec<usize> },
    /// The app pulls so many entries after its cursor.
    Pull { at: usize, limit: usize },
    /// One dials the other; the connection breaks after `lasts` ms, if it is given.
    Connect { from: usize, to: usize, lasts: Option<u64> },
    /// All connections between two break.
    Disconnect { a: usize, b: usize },
    /// The network falls apart: only places on one side reach each other.
    Partition { sides: Vec<u8> },
    /// The network is whole again.
    Heal,
    /// The process or the machine dies at the n-th change of its disk from now, or at once, and is down for a while.
    Crash { at: usize, after: Option<u64>, survive: Left, down: u64, again: Option<u64> },
    /// The n-th change of a disk from now fails.
    DiskError { at: usize, after: u64 },
    /// A disk has so many bytes left.
    DiskFull { at: usize, free: usize },
    /// A disk has room again.
    DiskRoom { at: usize },
    /// A clock jumps.
    Clock { at: usize, days: i64 },
    /// A backup of the home is made, in place of the one before.
    Backup { at: usize },
    /// The home is replaced by its backup, at the same place.
    Restore { at: usize },
    /// A home is copied while in use, to a place where there is none.
    Copy { from: usize, to: usize },
    /// A member admits a newcomer.
    Join { by: usize, newcomer: usize, admin: bool },
    /// A member makes or revokes an invite.
    Invite { at: usize },
    /// A member starts a new epoch.
    Rotate { at: usize },
    /// The hostile peer is removed, if it was let in.
    Remove { at: usize },
    /// A member hands another every epoch it knows.
    Grant { from: usize, to: usize },
    /// The liar meets a replica and does its worst.
    Lie { to: usize, dials: bool, lie: Lie },
    /// A user changes a folder, now or after so many operations of the engine; the system may not say so.
    Edit { at: usize, edit: Edit, after: Option<u64>, noticed: bool },
    /// A device looks at all of its folder.
    Scan { at: usize },
    /// The disk fails under the n-th operation of the engine on a folder.
    FolderTrouble { at: usize, after: u64, trouble: Trouble, survive: Left },
}

/// What is left of unsynced writes after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Left {
    /// Everything: the process was killed.
    Everything,
    /// Nothing.
    Nothing,
    /// Some sectors.
    Some,
}

impl From<Left> for Survive {
    fn from(left: Left) -> Self {
        match left {
            Left::Everything => Self::Everything,
            Left::Nothing => Self::Nothing,
            Left::Some => Self::Some,
        }
    }
}

/// What a liar does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lie {
    /// Bytes that are no frame, instead of a HELLO.
    Garbage,
    /// Lengths and counts that are too large, instead of a HELLO.
    LengthBomb,
    /// Frames before any HELLO.
    EarlyFrames,
    /// Nothing at all.
    Silence,
    /// A HELLO without a token.
    NoToken,
    /// A HELLO with the token of another author.
    BorrowedToken,
    /// A HELLO in the name of an honest author.
    OtherName,
    /// A HELLO for another group.
    OtherGroup,
    /// A HELLO whose token the liar signed itself.
    OwnToken,
    /// A HELLO with a proof taken from another channel.
    OldProof,
    /// A second HELLO, a WELCOME and answers nobody asked for.
    OutOfTurn,
    /// Entries in the name of others, with signatures that do not verify.
    Forge,
    /// A run of entries with a bad signature in the middle and nothing behind it to vouch.
    BadSignature,
    /// A run that ends well, sent so that a bad signature comes first and alone.
    LateVoucher,
    /// Others' entries cut short, changed, doubled and in reverse.
    Mangle,
    /// Positions that do not exist.
    FakePosition,
    /// Entries with numbers left out.
    Holes,
    /// Says it holds everything, so that it is sent nothing.
    HaveAll,
    /// Says it holds nothing, and reads everything again.
    HaveNothing,
    /// Says it holds more of the other's own feed than the other.
    FeedAhead,
    /// Two entries with one number, one to each of two replicas.
    Fork,
    /// Many PULLs.
    PullBomb,
    /// Asks for every number of every feed.
    WantBomb,
    /// Acknowledges what was never sent.
    AckUnsent,
    /// Garbage once it is believed.
    LateGarbage,
    /// Says it is the database of another replica, and that nothing is missing.
    Impersonate,
    /// Admits honest authors once more, and a stranger.
    Readmit,
    /// A rotation that only few can open, and entries sealed in it.
    Rotate,
    /// Behaves.
    Honest,
}

/// Every lie.
pub const LIES: &[Lie] = &[
    Lie::Garbage,
    Lie::LengthBomb,
    Lie::EarlyFrames,
    Lie::Silence,
    Lie::NoToken,
    Lie::BorrowedToken,
    Lie::OtherName,
    Lie::OtherGroup,
    Lie::OwnToken,
    Lie::OldProof,
    Lie::OutOfTurn,
    Lie::Forge,
    Lie::BadSignature,
    Lie::LateVoucher,
    Lie::Mangle,
    Lie::FakePosition,
    Lie::Holes,
    Lie::HaveAll,
    Lie::HaveNothing,
    Lie::FeedAhead,
    Lie::Fork,
    Lie::PullBomb,
    Lie::WantBomb,
    Lie::AckUnsent,
    Lie::LateGarbage,
    Lie::Impersonate,
    Lie::Readmit,
    Lie::Rotate,
    Lie::Honest,
];

/// Draws a run of so many steps.
#[must_use]
pub fn draw(seed: u64, steps: usize) -> Recording {
    let mut rng = derive(seed, "actions");
    let rng = &mut rng;
    let replicas = 2 + index(rng, MAX_REPLICAS - 1);
    let joined = 1 + index(rng, replicas);
    let liar = match below(rng, 4) {
        0 => Some(Liar::Stranger),
        1 => Some(Liar::Member),
        _ => None,
    };
    // some runs are about disks, some about the network, some about both
    let weights = Weights {
        disk: [0, 1, 3][index(rng, 3)],
        rollback: [0, 1, 4][index(rng, 3)],
        network: 1 + below(rng, 3),
        lies: u64::from(liar.is_some()),
        folders: 0,
    };
    // folders are drawn apart, so that what is about logs stays as it is drawn
    let folders = chance(&mut derive(seed, "with folders"), 60);
    let weights = if folders { Weights { folders: 1 + below(rng, 3), ..weights } } else { weights };
    let mut draw = Draw { rng, replicas, weights };
    let steps = (0..steps as u64).map(|id| draw.step(id)).collect();
    Recording { seed, replicas, joined, liar, folders, steps, broke: None }
}

#[derive(Clone, Copy)]
struct Weights {
    disk: u64,
    rollback: u64,
    network: u64,
    lies: u64,
    folders: u64,
}

/// How often something is done, and what draws it.
type Kind<D> = (u64, fn(&mut D) -> Action);

struct Draw<'a, R> {
    rng: &'a mut R,
    replicas: usize,
    weights: Weights,
}

impl<R: Rng> Draw<'_, R> {
    fn step(&mut self, id: u64) -> Step {
        let wait = if chance(self.rng, 30) { below(self.rng, 5) } else { below(self.rng, MAX_WAIT) };
        Step { id, wait, action: self.action() }
    }

    fn place(&mut self) -> usize {
        index(self.rng, self.replicas)
    }

    /// Two places that are not one.
    fn pair(&mut self) -> (usize, usize) {
        let first = self.place();
        (first, (first + 1 + index(self.rng, self.replicas - 1)) % self.replicas)
    }

    fn action(&mut self) -> Action {
        let Weights { disk, rollback, network, lies, folders } = self.weights;
        let kinds: [Kind<Self>; 23] = [
            (if folders > 0 { 6 } else { 24 }, Self::push),
            (8, Self::pull),
            (18, Self::connect),
            (2 * network, Self::disconnect),
            (network, Self::partition),
            (2 * network, |_| Action::Heal),
            (4 * disk, Self::crash),
            (2 * disk, |draw| Action::DiskError { at: draw.place(), after: below(draw.rng, 20) }),
            (disk, |draw| Action::DiskFull { at: draw.place(), free: index(draw.rng, 64 << 10) }),
            (2 * disk, |draw| Action::DiskRoom { at: draw.place() }),
            (1, |draw| Action::Clock { at: draw.place(), days: draw.days() }),
            (rollback, |draw| Action::Backup { at: draw.place() }),
            (rollback, |draw| Action::Restore { at: draw.place() }),
            (1, Self::copy),
            (4, Self::join),
            (1, |draw| Action::Invite { at: draw.place() }),
            (2, |draw| Action::Rotate { at: draw.place() }),
            // what a folder took in from behind a removal stays there
            (if folders > 0 { 0 } else { lies }, |draw| Action::Remove { at: draw.place() }),
            (1, Self::grant),
            (16 * lies, Self::lie),
            (24 * folders, Self::edit),
            (folders, |draw| Action::Scan { at: draw.place() }),
            (3 * disk * folders, Self::folder_trouble),
        ];
        let mut left = below(self.rng, kinds.iter().map(|(weight, _)| weight).sum());
        for (weight, make) in kinds {
            if left < weight {
                return make(self);
            }
            left -= weight;
        }
        Action::Heal
    }

    fn push(&mut self) -> Action {
        let at = self.place();
        let count = if chance(self.rng, 70) { 1 + index(self.rng, 3) } else { 1 + index(self.rng, 20) };
        Action::Push { at, sizes: (0..count).map(|_| self.size()).collect() }
    }

    /// Mostly small, as app state is.
    fn size(&mut self) -> usize {
        let largest = match below(self.rng, 20) {
            0 => 64 << 10,
            1..4 => 4 << 10,
            _ => 200,
        };
        index(self.rng, largest + 1)
    }

    fn pull(&mut self) -> Action {
        Action::Pull { at: self.place(), limit: 1 + index(self.rng, 40) }
    }

    fn connect(&mut self) -> Action {
        let (from, to) = self.pair();
        let lasts = chance(self.rng, 40).then(|| below(self.rng, 400));
        Action::Connect { from, to, lasts }
    }

    fn disconnect(&mut self) -> Action {
        let (a, b) = self.pair();
        Action::Disconnect { a, b }
    }

    fn partition(&mut self) -> Action {
        Action::Partition { sides: (0..self.replicas).map(|_| u8::from(chance(self.rng, 50))).collect() }
    }

    fn crash(&mut self) -> Action {
        Action::Crash {
            at: self.place(),
            after: chance(self.rng, 70).then(|| below(self.rng, 24)),
            survive: [Left::Everything, Left::Nothing, Left::Some, Left::Some][index(self.rng, 4)],
            down: below(self.rng, 2 * MAX_WAIT),
            again: chance(self.rng, 25).then(|| below(self.rng, 12)),
        }
    }

    fn edit(&mut self) -> Action {
        let edit = match below(self.rng, 20) {
            0..8 => Edit::Write { path: self.path(), size: self.file_size(), beside: chance(self.rng, 60) },
            8 => Edit::Copy { from: self.path(), to: self.path() },
            9..12 => Edit::Remove { path: self.path() },
            12..15 => Edit::Rename { from: self.path(), to: self.path() },
            15 => Edit::Mode { path: self.path(), mode: [0o600, 0o644, 0o755, 0o700][index(self.rng, 4)] },
            16..18 => Edit::Directory { path: self.path() },
            18 => Edit::Link { path: self.path(), target: self.path() },
            _ => Edit::Write { path: self.path(), size: 24, beside: false },
        };
        let after = chance(self.rng, 25).then(|| below(self.rng, 10));
        Action::Edit { at: self.place(), edit, after, noticed: chance(self.rng, 85) }
    }

    /// Few names, so that edits meet.
    fn path(&mut self) -> String {
        const NAMES: [&str; 5] = ["a", "b.txt", "c", "d", "e"];
        let depth = [1, 1, 1, 2, 2, 3][index(self.rng, 6)];
        (0..depth).map(|_| NAMES[index(self.rng, NAMES.len())]).collect::<Vec<_>>().join("/")
    }

    fn file_size(&mut self) -> usize {
        if chance(self.rng, 80) { 24 + index(self.rng, 40) } else { index(self.rng, 6000) }
    }

    fn folder_trouble(&mut self) -> Action {
        Action::FolderTrouble {
            at: self.place(),
            after: below(self.rng, 16),
            trouble: [Trouble::PowerCut, Trouble::PowerCut, Trouble::IoError, Trouble::DiskFull][index(self.rng, 4)],
            survive: [Left::Everything, Left::Nothing, Left::Some, Left::Some][index(self.rng, 4)],
        }
    }

    fn days(&mut self) -> i64 {
        i64::try_from(below(self.rng, 2 * YEAR.unsigned_abs() + 1)).unwrap_or(0) - YEAR
    }

    fn copy(&mut self) -> Action {
        let (from, to) = self.pair();
        Action::Copy { from, to }
    }

    fn join(&mut self) -> Action {
        let (by, newcomer) = self.pair();
        Action::Join { by, newcomer, admin: chance(self.rng, 30) }
    }

    fn grant(&mut self) -> Action {
        let (from, to) = self.pair();
        Action::Grant { from, to }
    }

    fn lie(&mut self) -> Action {
        Action::Lie { to: self.place(), dials: chance(self.rng, 70), lie: LIES[index(self.rng, LIES.len())] }
    }
}
