-- The log of a relay in PostgreSQL, in a schema of its own; several processes work on it at once.

CREATE SCHEMA sync_relay;

-- What this database says about itself: version, replica id.
CREATE TABLE sync_relay.meta (
  key text PRIMARY KEY,
  value bytea NOT NULL
);

CREATE TABLE sync_relay.groups (
  gid bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  id bytea NOT NULL UNIQUE,
  charter bytea NOT NULL
);

-- What goes on with a group's log: whoever changes the log locks its row first, so that cursors have no gaps and become
-- visible in their order. Apart from the charter, since every push writes the row anew.
CREATE TABLE sync_relay.logs (
  gid bigint PRIMARY KEY REFERENCES sync_relay.groups,
  version bigint NOT NULL DEFAULT 0,    -- grows with every change of the log
  max_cursor bigint NOT NULL DEFAULT 0,
  bytes bigint NOT NULL DEFAULT 0,      -- of the envelopes
  holds_from bigint NOT NULL DEFAULT 1  -- from this cursor on nothing was dropped
) WITH (fillfactor = 50);

CREATE TABLE sync_relay.feeds (
  feed bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  gid bigint NOT NULL REFERENCES sync_relay.groups,
  author bytea NOT NULL,
  head bytea NOT NULL,                  -- hash of the highest envelope held
  fork bigint,                          -- lowest number with two known hashes
  UNIQUE (gid, author)
);

CREATE TABLE sync_relay.feed_ranges (
  feed bigint NOT NULL REFERENCES sync_relay.feeds,
  first bigint NOT NULL,
  last bigint NOT NULL,
  PRIMARY KEY (feed, first)
);

-- Numbers among a feed's ranges whose envelopes expired.
CREATE TABLE sync_relay.dropped (
  feed bigint NOT NULL REFERENCES sync_relay.feeds,
  first bigint NOT NULL,
  last bigint NOT NULL,
  head bytea NOT NULL,                  -- hash of the envelope at the last number
  PRIMARY KEY (feed, first)
);

-- Up to which cursor a group's log went at a time, so that what is old can be told.
CREATE TABLE sync_relay.marks (
  gid bigint NOT NULL REFERENCES sync_relay.groups,
  at bigint NOT NULL,                   -- Unix ms
  cursor bigint NOT NULL,
  PRIMARY KEY (gid, at)
);

-- Up to where each device's log was read.
CREATE TABLE sync_relay.peers (
  gid bigint NOT NULL REFERENCES sync_relay.groups,
  replica bytea NOT NULL,
  cursor bigint NOT NULL DEFAULT 0,
  chk bytea NOT NULL DEFAULT '\x0000000000000000',
  PRIMARY KEY (gid, replica)
);

-- The newest row of a group that expired keeps its cursor's check and nothing else.
CREATE TABLE sync_relay.entries (
  gid bigint NOT NULL,
  cursor bigint NOT NULL,
  chk bytea NOT NULL,
  feed bigint,
  number bigint,
  class smallint,
  source bytea,                         -- replica that sent it
  hash bytea,
  previous bytea,
  bytes bytea,
  PRIMARY KEY (gid, cursor)
);

-- What is sealed does not get shorter.
ALTER TABLE sync_relay.entries ALTER COLUMN bytes SET STORAGE EXTERNAL;

CREATE INDEX entries_by_number ON sync_relay.entries (feed, number);
CREATE INDEX entries_open ON sync_relay.entries (gid, cursor) WHERE class > 0;

-- Requests to join that wait for a member who is away, sealed, and their answers.
CREATE TABLE sync_relay.requests (
  place bytea NOT NULL,                 -- lookup id of the code
  number bigint NOT NULL,
  owner bytea NOT NULL,                 -- what shows whose it is to answer
  left_at bigint NOT NULL,              -- Unix ms
  request bytea NOT NULL,
  answer bytea,
  PRIMARY KEY (place, number)
);
