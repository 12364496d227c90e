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
  behind INTEGER NOT NULL DEFAULT 0  -- 1: others hold entries of our author that were not written here
) STRICT;

CREATE TABLE feeds (
  feed INTEGER PRIMARY KEY,
  gid INTEGER NOT NULL REFERENCES groups,
  author BLOB NOT NULL,
  own INTEGER NOT NULL,              -- 1: the author is or was ours
  head BLOB NOT NULL,                -- hash of the highest envelope held
  fork INTEGER,                      -- lowest number with two known hashes
  UNIQUE (gid, author)
) STRICT;

CREATE TABLE feed_ranges (
  feed INTEGER NOT NULL REFERENCES feeds,
  first INTEGER NOT NULL,
  last INTEGER NOT NULL,
  PRIMARY KEY (feed, first)
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
  state INTEGER NOT NULL,            -- 0 readable, 1 waits for its epoch, 2 moved
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
