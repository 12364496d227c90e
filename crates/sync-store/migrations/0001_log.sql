-- What this database says about itself: replica id, fingerprint.
CREATE TABLE meta (
  key TEXT NOT NULL PRIMARY KEY,
  value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- Secrets, sealed before they come here.
CREATE TABLE secrets (
  kind TEXT NOT NULL,
  id BLOB NOT NULL,
  value BLOB NOT NULL,
  PRIMARY KEY (kind, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE groups (
  gid INTEGER PRIMARY KEY,
  id BLOB NOT NULL UNIQUE,
  charter BLOB NOT NULL,
  author BLOB NOT NULL,              -- the author that writes here
  state INTEGER NOT NULL DEFAULT 0,  -- 0 active, 1 left
  behind INTEGER NOT NULL DEFAULT 0, -- 1: others hold entries of our author that were not written here
  holds_from INTEGER NOT NULL DEFAULT 1 -- from this cursor on nothing was dropped
) STRICT;

CREATE TABLE feeds (
  feed INTEGER PRIMARY KEY,
  gid INTEGER NOT NULL REFERENCES groups,
  author BLOB NOT NULL,
  own INTEGER NOT NULL,              -- 1: the author is or was ours
  head BLOB NOT NULL,                -- hash of the highest envelope held
  fork INTEGER,                      -- lowest number with two known hashes
  ends INTEGER,                      -- its author was removed: the last number that counts
  UNIQUE (gid, author)
) STRICT;

CREATE TABLE feed_ranges (
  feed INTEGER NOT NULL REFERENCES feeds,
  first INTEGER NOT NULL,
  last INTEGER NOT NULL,
  PRIMARY KEY (feed, first)
) STRICT, WITHOUT ROWID;

-- Numbers among a feed's ranges whose envelopes are not here: a complete snapshot says what they led to, or a relay let
-- them expire.
CREATE TABLE dropped (
  feed INTEGER NOT NULL REFERENCES feeds,
  first INTEGER NOT NULL,
  last INTEGER NOT NULL,
  head BLOB NOT NULL,                -- hash of the envelope at the last number
  PRIMARY KEY (feed, first)
) STRICT, WITHOUT ROWID;

-- Up to which cursor a relay's log of a group went at a time, so that what is old can be told.
CREATE TABLE marks (
  gid INTEGER NOT NULL REFERENCES groups,
  at INTEGER NOT NULL,               -- Unix ms
  cursor INTEGER NOT NULL,
  PRIMARY KEY (gid, at)
) STRICT, WITHOUT ROWID;

CREATE TABLE peers (
  peer INTEGER PRIMARY KEY,
  gid INTEGER NOT NULL REFERENCES groups,
  replica BLOB NOT NULL,
  author BLOB,
  device BLOB,
  name TEXT NOT NULL DEFAULT '',
  addresses TEXT NOT NULL DEFAULT '', -- one a line
  addresses_at INTEGER,               -- Unix ms
  last_seen INTEGER,                  -- Unix ms
  cursor INTEGER NOT NULL DEFAULT 0,  -- last cursor seen from that replica
  chk BLOB NOT NULL DEFAULT x'0000000000000000',
  acked INTEGER NOT NULL DEFAULT 0,   -- highest cursor of ours it holds
  UNIQUE (gid, replica)
) STRICT;

-- A moved row (state 2) keeps its cursor's check and nothing else.
CREATE TABLE entries (
  id INTEGER PRIMARY KEY,            -- gid << 40 | cursor
  chk BLOB NOT NULL,
  state INTEGER NOT NULL,            -- 0 readable, 1 waits for its epoch, 2 moved, 3 does not count: behind a removal
  feed INTEGER REFERENCES feeds,
  number INTEGER,
  class INTEGER,
  own INTEGER,                       -- 1: its author is or was ours, 2: and it was written here
  source INTEGER REFERENCES peers,   -- who sent it
  blob_id BLOB,
  hash BLOB,
  previous BLOB,
  digest BLOB,                       -- keyed hash of the content, of what was written here
  epoch_number INTEGER,              -- of those that wait
  epoch_hash BLOB,
  bytes BLOB,
  CHECK (state = 2 OR (feed IS NOT NULL AND number IS NOT NULL AND class IS NOT NULL AND own IS NOT NULL
    AND blob_id IS NOT NULL AND hash IS NOT NULL AND previous IS NOT NULL AND bytes IS NOT NULL))
) STRICT;

CREATE INDEX entries_by_number ON entries (feed, number) WHERE feed IS NOT NULL;
CREATE INDEX entries_by_blob ON entries (feed, blob_id) WHERE own > 0;
CREATE INDEX entries_waiting ON entries (epoch_number, epoch_hash) WHERE state = 1;
CREATE INDEX entries_membership ON entries (feed) WHERE class = 1;
CREATE INDEX entries_rotation ON entries (feed) WHERE class = 2;
CREATE INDEX entries_open ON entries (class) WHERE class > 0;

CREATE TABLE invites (
  gid INTEGER NOT NULL REFERENCES groups,
  invite BLOB NOT NULL,
  state INTEGER NOT NULL,            -- 0 open, 1 used, 2 expired, 3 revoked
  expires INTEGER NOT NULL,          -- Unix ms
  used_by BLOB,
  PRIMARY KEY (gid, invite)
) STRICT, WITHOUT ROWID;

-- At a relay: requests to join that wait for a member who is away, sealed, and their answers.
CREATE TABLE requests (
  place BLOB NOT NULL,               -- lookup id of the code
  number INTEGER NOT NULL,
  owner BLOB NOT NULL,               -- what shows whose it is to answer
  left_at INTEGER NOT NULL,          -- Unix ms
  request BLOB NOT NULL,
  answer BLOB,
  PRIMARY KEY (place, number)
) STRICT, WITHOUT ROWID;

-- A folder of a group. What its files' columns mean is the engine's matter.
CREATE TABLE folders (
  fid INTEGER PRIMARY KEY,
  gid INTEGER NOT NULL REFERENCES groups,
  id BLOB NOT NULL,
  name TEXT NOT NULL,
  root TEXT,                         -- absolute path on this device; NULL where it is not placed
  settings TEXT NOT NULL DEFAULT '', -- opaque
  cursor INTEGER NOT NULL DEFAULT 0, -- the group's log up to here was taken into files
  since_entries INTEGER NOT NULL DEFAULT 0, -- taken in since the last snapshot
  since_records INTEGER NOT NULL DEFAULT 0,
  UNIQUE (gid, id)
) STRICT;

-- Which entries were taken into a folder's files: records and snapshots of its stream, as runs of numbers.
CREATE TABLE folder_runs (
  fid INTEGER NOT NULL REFERENCES folders ON DELETE CASCADE,
  feed INTEGER NOT NULL REFERENCES feeds,
  first INTEGER NOT NULL,
  last INTEGER NOT NULL,
  PRIMARY KEY (fid, feed, first)
) STRICT, WITHOUT ROWID;

-- Up to which number snapshots cover a feed: those that were taken in, and those that were found to say the same.
CREATE TABLE folder_covered (
  fid INTEGER NOT NULL REFERENCES folders ON DELETE CASCADE,
  feed INTEGER NOT NULL REFERENCES feeds,
  last INTEGER NOT NULL,
  compared INTEGER NOT NULL DEFAULT 0, -- entries below this one may go
  PRIMARY KEY (fid, feed)
) STRICT, WITHOUT ROWID;

CREATE TABLE snapshots (
  sid INTEGER PRIMARY KEY,
  fid INTEGER NOT NULL REFERENCES folders ON DELETE CASCADE,
  feed INTEGER REFERENCES feeds,     -- its entry; NULL until it is told
  number INTEGER,
  state INTEGER NOT NULL,            -- 0 being written, 1 told, 2 complete, 3 refused
  taken BLOB,                        -- the key up to which its rows were taken in
  body BLOB NOT NULL                 -- opaque: what its entry says
) STRICT;

CREATE INDEX snapshots_by_folder ON snapshots (fid);

-- Which pieces each snapshot needs: a piece goes once none does.
CREATE TABLE snapshot_needs (
  sid INTEGER NOT NULL REFERENCES snapshots ON DELETE CASCADE,
  hash BLOB NOT NULL,
  PRIMARY KEY (sid, hash)
) STRICT, WITHOUT ROWID;

CREATE INDEX snapshot_needs_by_hash ON snapshot_needs (hash);

-- Pieces of snapshots.
CREATE TABLE snapshot_chunks (
  id INTEGER PRIMARY KEY,
  fid INTEGER NOT NULL REFERENCES folders ON DELETE CASCADE,
  hash BLOB NOT NULL,
  codec INTEGER NOT NULL,            -- opaque: how its bytes are packed
  len INTEGER NOT NULL,              -- of the piece itself
  bytes BLOB NOT NULL,
  UNIQUE (hash, fid)
) STRICT;

CREATE INDEX snapshot_chunks_by_folder ON snapshot_chunks (fid);

-- The index: of each path what the group says and what lay on disk. The columns of disk are NULL where nothing did.
-- The blob that can be long comes last, so that whoever reads the others need not read it.
CREATE TABLE files (
  file INTEGER PRIMARY KEY,
  fid INTEGER NOT NULL REFERENCES folders ON DELETE CASCADE,
  key BLOB NOT NULL,                 -- the path, as it is sorted
  live INTEGER NOT NULL,             -- 1: the winner is not a deletion
  size INTEGER NOT NULL,             -- the winner's bytes
  pending INTEGER NOT NULL,          -- 1: what the group says and what is on disk differ
  disk_kind INTEGER,
  disk_size INTEGER,
  disk_mtime INTEGER,                -- Unix ns
  disk_ino INTEGER,
  disk_mode INTEGER,
  disk_hash BLOB,
  disk_vector BLOB,
  whole INTEGER NOT NULL DEFAULT 0,  -- 1: what is on disk is one chunk, which takes no row of chunks
  left_out INTEGER NOT NULL DEFAULT 0, -- 1: this device does not take the path
  versions BLOB NOT NULL,            -- opaque: the maximal versions
  UNIQUE (fid, key)
) STRICT;

CREATE INDEX files_pending ON files (fid, key) WHERE pending > 0;
-- Eight bytes of a hash tell files apart; all of it would make most of the index's pages, and each file touches another.
CREATE INDEX files_by_hash ON files (fid, substr(disk_hash, 1, 8)) WHERE disk_hash IS NOT NULL;

-- What lies in files on disk, except in those that are one chunk: their own hash finds them.
CREATE TABLE chunks (
  hash BLOB NOT NULL,
  fid INTEGER NOT NULL,              -- the folder of its file
  file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
  offset INTEGER NOT NULL,
  len INTEGER NOT NULL,
  PRIMARY KEY (hash, fid, file, offset)
) STRICT, WITHOUT ROWID;

CREATE INDEX chunks_by_file ON chunks (file, offset);

-- Versions that were replaced or removed.
CREATE TABLE kept (
  kid INTEGER PRIMARY KEY,
  fid INTEGER NOT NULL REFERENCES folders ON DELETE CASCADE,
  key BLOB NOT NULL,
  at INTEGER NOT NULL,               -- Unix ms
  name TEXT NOT NULL,                -- its file below .syncshell/versions
  size INTEGER NOT NULL,
  hash BLOB,
  mode INTEGER NOT NULL,
  mtime INTEGER NOT NULL,            -- Unix ns
  reason INTEGER NOT NULL
) STRICT;

CREATE INDEX kept_by_key ON kept (fid, key, at);
CREATE INDEX kept_by_hash ON kept (fid, substr(hash, 1, 8)) WHERE hash IS NOT NULL;
CREATE INDEX kept_by_time ON kept (fid, at, kid, size);

-- The chunks of kept versions, except of those that are one chunk.
CREATE TABLE kept_chunks (
  hash BLOB NOT NULL,
  kid INTEGER NOT NULL REFERENCES kept ON DELETE CASCADE,
  offset INTEGER NOT NULL,
  len INTEGER NOT NULL,
  PRIMARY KEY (hash, kid, offset)
) STRICT, WITHOUT ROWID;

CREATE INDEX kept_chunks_by_version ON kept_chunks (kid, offset);

-- Texts as they were last in sync, from which two edits are merged. The key leads, since a path has few.
CREATE TABLE texts (
  fid INTEGER NOT NULL REFERENCES folders ON DELETE CASCADE,
  key BLOB NOT NULL,
  hash BLOB NOT NULL,
  at INTEGER NOT NULL,               -- Unix ms
  vector BLOB NOT NULL,              -- of the version that it is
  packed BLOB NOT NULL,
  PRIMARY KEY (fid, key, hash)
) STRICT;

CREATE INDEX texts_by_time ON texts (fid, at, length(packed));

-- Of each folder the sums over its files, so that nobody has to count them; a transaction adds to them at its end.
-- Sizes are whatever a peer says: sums of their halves cannot overflow.
CREATE TABLE folder_totals (
  fid INTEGER PRIMARY KEY REFERENCES folders ON DELETE CASCADE,
  files INTEGER NOT NULL DEFAULT 0,
  bytes_high INTEGER NOT NULL DEFAULT 0,
  bytes_low INTEGER NOT NULL DEFAULT 0,
  pending_files INTEGER NOT NULL DEFAULT 0,
  pending_high INTEGER NOT NULL DEFAULT 0,
  pending_low INTEGER NOT NULL DEFAULT 0,
  left_out_files INTEGER NOT NULL DEFAULT 0,
  left_out_high INTEGER NOT NULL DEFAULT 0,
  left_out_low INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TRIGGER folder_added AFTER INSERT ON folders BEGIN
  INSERT INTO folder_totals (fid) VALUES (NEW.fid);
END;

