//! Every bound on a count or a length, with its reason; checked before anything is allocated.

/// App bytes in one blob; larger content belongs in chunks.
pub const MAX_APP_BYTES: usize = 1 << 20;
/// An envelope: app bytes, worst-case padding (12 %) and the header.
pub const MAX_ENVELOPE: usize = (1 << 20) + (1 << 18);
/// A frame: several envelopes of the largest size, or thousands of small ones.
pub const MAX_FRAME: usize = 4 << 20;
/// Envelopes in one frame: keeps the work between two acknowledgements short.
pub const MAX_FRAME_ENVELOPES: usize = 4096;
/// Bytes of envelopes a sender puts in one frame before it starts the next.
pub const FRAME_BYTES_TARGET: usize = 512 << 10;
/// A charter: one author's keys and a few numbers.
pub const MAX_CHARTER: usize = 2 << 10;
/// A membership operation: one author's keys and a few hashes, or where the feeds of a removed member end.
pub const MAX_OPERATION: usize = 24 << 10;
/// Feeds whose ends a removal names: the authors of one member, of which most have a few.
pub const MAX_CUTS: usize = 256;
/// Admissions between the founder and an author; longer chains are admitted anew.
pub const MAX_TOKEN: usize = 64;
/// Membership envelopes an operation names as seen: the tips of a graph that rarely has more than a few.
pub const MAX_SEEN: usize = 64;
/// Ranges of numbers named per feed; claiming less than is held is always safe.
pub const MAX_RANGES: usize = 64;
/// Feeds named in one `have`: some authors for each of 500 members.
pub const MAX_FEEDS: usize = 4096;
/// Addresses of one device.
pub const MAX_ADDRESSES: usize = 16;
/// Relays of one group: more only repeat what the others keep.
pub const MAX_RELAYS: usize = 8;
/// Bytes of the address at which a device is woken: push services' are shorter.
pub const MAX_WAKE_URL: usize = 512;
/// Characters (bytes) of an address, an error text or a name.
pub const MAX_TEXT: usize = 256;
/// Bytes of a device's or member's name.
pub const MAX_NAME: usize = 64;
/// Ranges in one WANT.
pub const MAX_WANTS: usize = 1024;
/// Bytes of the epochs sealed for a newcomer: 4096 epochs, three centuries of monthly rotations.
pub const MAX_EPOCHS_SEALED: usize = 512 << 10;
/// Nested containers a reader skips over in fields it does not know.
pub const MAX_DEPTH: usize = 16;
/// Bytes of a path in a folder.
pub const MAX_PATH: usize = 4096;
/// Bytes of one component of a path: what every file system we know of holds.
pub const MAX_COMPONENT: usize = 255;
/// Components of a path.
pub const MAX_PATH_DEPTH: usize = 256;
/// Records in one entry: their place has 16 bits.
pub const MAX_RECORDS: usize = 1 << 16;
/// Bytes of an entry with records that writers aim at: large enough that a seal and a signature weigh nothing, small
/// enough that the first files move while the rest is being read.
pub const RECORDS_BYTES_TARGET: usize = 256 << 10;
/// Authors named in one entry with records.
pub const MAX_BATCH_AUTHORS: usize = 4096;
/// Authors in what one version has seen: more than ever wrote one path; who edits joins them.
pub const MAX_VECTOR: usize = 1024;
/// Bytes of a chunk, whatever a charter says.
pub const MAX_CHUNK: u64 = 4 << 20;
/// Chunks that a record names itself; a longer list is cut into chunks.
pub const MAX_INLINE_CHUNKS: usize = 64;
/// Bytes of a snapshot's content: some ten million paths.
pub const MAX_SNAPSHOT: u64 = 4 << 30;
/// Bytes of one item of a snapshot: a path's versions, of which nearly always there is one.
pub const MAX_SNAPSHOT_ITEM: usize = 1 << 20;
/// Ranges in one item of a snapshot; longer lists take several items.
pub const MAX_SNAPSHOT_RANGES: usize = 4096;
/// Chunks asked for in one message.
pub const MAX_CHUNKS_ASKED: usize = 1024;
/// Bytes of one message on a stream that fetches chunks: a chunk and what is around it.
pub const MAX_CHUNK_FRAME: usize = (4 << 20) + 4096;
/// Kept versions of a path that a peer is told of: more than staggered keeping leaves of a year.
pub const MAX_KEPT: usize = 256;
