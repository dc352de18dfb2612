-- The outbox: an append-only log that is read by snapshots. internal/outbox explains why nothing in it is skipped.

-- +goose Up

-- The time slot that a new row falls into. Eight slots of four hours make a ring: a slot is emptied as a whole when every
-- row in it is delivered and past its retention, so the log never needs a DELETE and never bloats.
CREATE FUNCTION outbox_slot(at timestamptz) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (floor(extract(epoch FROM at) / 14400)::bigint % 8)::smallint;

-- A UUIDv7 for writers that have no library for it: 48 bits of Unix milliseconds, then random bits (RFC 9562, section 5.7).
-- gen_random_uuid() sets the variant; version 4 (0100) becomes 7 (0111) by setting two bits.
CREATE FUNCTION outbox_uuidv7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid;

-- Header names must not be able to become AMQP properties or RabbitMQ's own headers (CC, x-*): see internal/messaging.
-- +goose StatementBegin
CREATE FUNCTION outbox_headers_valid(headers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF headers = '{}' THEN
        RETURN true;
    ELSIF jsonb_typeof(headers) <> 'object' THEN
        RETURN false;
    END IF;
    RETURN (
        SELECT count(*) <= 32 AND bool_and(name ~ '^[a-z0-9][a-z0-9-]{0,63}$' AND name !~ '^x-' AND name <> 'message-key' AND jsonb_typeof(value) = 'string'
                                           AND octet_length(value #>> '{}') <= 1024)
        FROM jsonb_each(headers) AS header (name, value));
END
$$;
-- +goose StatementEnd

CREATE TABLE outbox (
    slot       smallint    NOT NULL DEFAULT outbox_slot(clock_timestamp()),
    -- Stands before id so that the transaction has its xid before the id is drawn. The reader's page query relies on it for
    -- speed (never for correctness): ids of transactions that began after a snapshot are larger than all ids in it.
    xid        xid8        NOT NULL DEFAULT pg_current_xact_id(),
    id         bigint      NOT NULL GENERATED ALWAYS AS IDENTITY (CACHE 1),
    shard      smallint    NOT NULL DEFAULT 0,
    message_id uuid        NOT NULL,
    type       text        NOT NULL,
    key        text        NOT NULL DEFAULT '',
    payload    bytea       NOT NULL,
    headers    jsonb       NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- For the pages of a large batch, in the order of id.
    CONSTRAINT outbox_pkey PRIMARY KEY (shard, id, slot),
    CONSTRAINT outbox_message_id_is_uuidv7 CHECK (get_byte(uuid_send(message_id), 6) >> 4 = 7),
    CONSTRAINT outbox_type_is_protobuf_name CHECK (octet_length(type) <= 255 AND type ~ '^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$'),
    CONSTRAINT outbox_key_fits CHECK (octet_length(key) <= 255),
    CONSTRAINT outbox_payload_fits CHECK (octet_length(payload) <= 1048576),
    CONSTRAINT outbox_headers_are_valid CHECK (outbox_headers_valid(headers))
) PARTITION BY LIST (slot);

-- +goose StatementBegin
DO $$
BEGIN
    FOR slot IN 0..7 LOOP
        EXECUTE format('CREATE TABLE outbox_slot_%s PARTITION OF outbox FOR VALUES IN (%s)', slot, slot);
    END LOOP;
END
$$;
-- +goose StatementEnd

-- For finding what became visible since a snapshot: a range of xids, and the few that were under way.
CREATE INDEX outbox_xid_idx ON outbox (shard, xid, id);

-- Writes messages in the order of the arrays. It is the one way into the log, for Go and for every other language:
-- inserting into the table directly would miss the key locks and with them the order per key.
-- +goose StatementBegin
CREATE FUNCTION outbox_insert(ids uuid[], types text[], keys text[], payloads bytea[], headers jsonb[]) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    -- Held to the end of the transaction: whoever writes the same key next draws its id after this commit is visible.
    -- In sorted order, so that two calls with several keys cannot wait for each other. 1869968482 is 'outb' in ASCII, a class
    -- of our own among advisory locks. Two keys with one hash only wait for each other.
    PERFORM pg_advisory_xact_lock(1869968482, lock.hash)
    FROM (SELECT DISTINCT hashtext(key) AS hash FROM unnest(keys) AS key WHERE key <> '' ORDER BY hash) AS lock;

    INSERT INTO outbox (message_id, type, key, payload, headers)
    SELECT message.id, message.type, coalesce(message.key, ''), message.payload, coalesce(message.headers, '{}')
    FROM unnest(ids, types, keys, payloads, headers) WITH ORDINALITY AS message (id, type, key, payload, headers, position)
    ORDER BY message.position;
END
$$;
-- +goose StatementEnd

-- The same for one message, for triggers and for writers in other languages; returns the message's ID.
-- +goose StatementBegin
CREATE FUNCTION outbox_insert(type text, key text, payload bytea, headers jsonb DEFAULT '{}', id uuid DEFAULT outbox_uuidv7()) RETURNS uuid
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM outbox_insert(ARRAY[id], ARRAY[type], ARRAY[key], ARRAY[payload], ARRAY[headers]);
    RETURN id;
END
$$;
-- +goose StatementEnd

-- Where the relay is, one row a shard.
CREATE TABLE outbox_cursor (
    shard            smallint    NOT NULL CONSTRAINT outbox_cursor_pkey PRIMARY KEY,
    -- The cluster whose transaction IDs the snapshots are made of. After a dump and restore they mean nothing, and the relay
    -- refuses to run rather than to skip.
    system_identifier bigint   NOT NULL,
    -- Everything visible in this snapshot is delivered; so is what is visible in batch up to last_id.
    delivered        pg_snapshot NOT NULL,
    batch            pg_snapshot,
    last_id          bigint      NOT NULL DEFAULT 0,
    -- The newest snapshot of which something may have been published. Its commit proves that what it shows is durable.
    claimed          pg_snapshot,
    -- Messages published and confirmed so far, and messages parked.
    published        bigint      NOT NULL DEFAULT 0,
    parked           bigint      NOT NULL DEFAULT 0,
    -- The lease: who may move this cursor, and until when by this database's clock. Each new holder raises the epoch.
    owner            text        NOT NULL DEFAULT '',
    epoch            bigint      NOT NULL DEFAULT 0,
    -- Counts the moves, so that a holder notices when the row is not as it left it: after a failover that lost some.
    moves            bigint      NOT NULL DEFAULT 0,
    lease_expires_at timestamptz NOT NULL DEFAULT '-infinity',
    moved_at         timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Before every transaction: all that was ever written is new.
INSERT INTO outbox_cursor (shard, system_identifier, delivered)
SELECT 0, system_identifier, '1:1:' FROM pg_control_system();

-- What could not be published or applied, with everything needed to look at it and to send it again.
CREATE TABLE dead_letter (
    id         bigint      NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT dead_letter_pkey PRIMARY KEY,
    -- '' when the relay parked it, else the consumer group.
    consumer   text        NOT NULL,
    -- Text, because a broken message may carry anything here.
    message_id text        NOT NULL,
    type       text        NOT NULL,
    key        text        NOT NULL,
    payload    bytea       NOT NULL,
    headers    jsonb       NOT NULL,
    reason     text        NOT NULL,
    error      text        NOT NULL,
    attempts   integer     NOT NULL,
    dead_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- +goose Down
DROP TABLE dead_letter, outbox_cursor, outbox;
DROP FUNCTION outbox_insert(text, text, bytea, jsonb, uuid);
DROP FUNCTION outbox_insert(uuid[], text[], text[], bytea[], jsonb[]);
DROP FUNCTION outbox_headers_valid, outbox_uuidv7, outbox_slot;
