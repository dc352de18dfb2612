-- The outbox: an append-only log that is read by snapshots. internal/outbox explains why nothing in it is skipped.

-- +goose Up

-- Who does what to the tables: each process logs in as one of these, and may do what its code does and no more. Roles belong to
-- the whole cluster. They have no passwords: give them some, or let pg_hba.conf say how they prove who they are. shop_all is for
-- the processes in one.
-- +goose StatementBegin
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY '{shop_api,shop_relay,shop_consumer,shop_operator,shop_all}'::text[] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = name);
        BEGIN
            EXECUTE format('CREATE ROLE %I LOGIN', name);
            IF name = 'shop_all' THEN
                GRANT shop_api, shop_relay, shop_consumer, shop_operator TO shop_all;
            END IF;
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN
                NULL; -- by a migration of another database, right now
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION 'the role % is missing, and % may not create it', name, current_user
                    USING HINT = 'As a superuser: CREATE ROLE ' || name || ' LOGIN, or ALTER ROLE ' || current_user || ' CREATEROLE.';
        END;
    END LOOP;
END
$$;
-- +goose StatementEnd

-- Clocks step. So a stored time is believed only as far as it can be true, and never further in the future than its own
-- interval: one that was written before the clock was set back would stand in the way until the clock comes there
-- again. Everything that compares a stored time with now does so through these functions; internal/dev/architecture holds the list
-- of exceptions.

-- Whether a lease, or another sign of life, holds that was given until expires_at for so long.
CREATE FUNCTION clock_holds(expires_at timestamptz, lease interval) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN expires_at > clock_timestamp() AND expires_at <= clock_timestamp() + lease;

-- Whether something happened within the interval, and not further ahead than that.
CREATE FUNCTION clock_within(happened_at timestamptz, span interval) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN happened_at > clock_timestamp() - span AND happened_at < clock_timestamp() + span;

-- How long ago something happened: never less than nothing.
CREATE FUNCTION clock_age(happened_at timestamptz) RETURNS interval
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN greatest(clock_timestamp() - happened_at, interval '0');

-- Fails unless each statement of the transaction sees what was committed before it. Functions that wait for a lock and
-- then look again rely on that: under REPEATABLE READ they would look at the past, and drop or forget what was
-- committed meanwhile. Each of them calls this first.
-- +goose StatementBegin
CREATE FUNCTION needs_read_committed() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE invalid_transaction_state USING MESSAGE = format('the transaction is %s, and this works under READ COMMITTED only',
            upper(current_setting('transaction_isolation'))), HINT = 'BEGIN ISOLATION LEVEL READ COMMITTED';
    END IF;
END
$$;
-- +goose StatementEnd

-- Names the columns of the schema whose sequence is behind: the last number drawn is less than the largest in use, so
-- numbers will be drawn twice. A backup takes sequences with it, and so does a physical standby; logical replication
-- and a copy of the rows do not. Found in the catalog, so that a new table is looked after by itself. The numbers in
-- use are read before the sequence is: what is inserted meanwhile does no harm.
-- +goose StatementBegin
CREATE FUNCTION sequences_behind() RETURNS TABLE (col text, owner regclass, seq regclass, drawn bigint, used bigint)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT attrelid::regclass AS of, attname, seqrelid::regclass AS sequence, seqstart
        FROM pg_depend
        JOIN pg_sequence ON seqrelid = objid
        JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
        JOIN pg_class ON pg_class.oid = attrelid
        WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass AND deptype IN ('a', 'i')
            AND relnamespace = 'public'::regnamespace AND seqincrement > 0
        ORDER BY attrelid::regclass::text, attname
    LOOP
        IF one.of = 'outbox'::regclass THEN -- by its index, and with what was delivered and forgotten
            SELECT greatest(max(top_id), max((SELECT max(id) FROM outbox WHERE outbox.shard = outbox_cursor.shard))) INTO used FROM outbox_cursor;
        ELSE
            EXECUTE format('SELECT max(%I)::bigint FROM %s', one.attname, one.of) INTO used;
        END IF;
        drawn := coalesce(pg_sequence_last_value(one.sequence), one.seqstart - 1);
        IF drawn < used THEN
            col := one.of || '.' || one.attname;
            owner := one.of;
            seq := one.sequence;
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
-- +goose StatementEnd

-- The time slot that a new row falls into. Five slots of eight hours make a ring: a slot is emptied as a whole when every
-- row in it is delivered and past its retention, so the log never needs a DELETE and never bloats. Five, because each read opens every slot.
CREATE FUNCTION outbox_slots() RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 5;

CREATE FUNCTION outbox_slot_length() RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN interval '8 hours';

--
-- The time is taken as an interval since the epoch, because date_part() of a timestamptz is only STABLE: Postgres does not inline an immutable
-- function that calls a stable one, and would plan this one anew for every insert, at a third of the insert's cost. And date_part() is
-- floating-point, which is exact enough and cheaper than the numeric of extract().
CREATE FUNCTION outbox_slot(at timestamptz) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (floor(date_part('epoch', at - timestamptz '1970-01-01 00:00:00+00') / date_part('epoch', outbox_slot_length()))::bigint % outbox_slots())::smallint;

-- The shard that a message belongs to: one for all, until outbox_set_shards says otherwise. The messages of a key are always in one.
CREATE FUNCTION outbox_shard(key text, message_id uuid) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 0::smallint;

-- The time of now in an ID, whose random bits stay: 48 bits of Unix milliseconds, and version 7 (RFC 9562, section 5.7). The variant is the
-- same in all versions; 7 is 0111, and of its bits all but the first are set here, so the ID must be of version 4 (0100) or 7.
CREATE FUNCTION outbox_redate(id uuid) RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN encode(set_bit(set_bit(overlay(uuid_send(id)
        PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid;

-- A UUIDv7 for writers that have no library for it.
CREATE FUNCTION outbox_uuidv7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN outbox_redate(gen_random_uuid());

-- Whether the time in a UUIDv7 is right enough by this database's clock: not so far ahead that the writer's clock must
-- be wrong, and not so old that an inbox may have forgotten its copies. What is accepted here, consumers take, with
-- time to spare at both ends: see inbox.ring. An ID is compared as the bytes that it begins with, the milliseconds
-- since 1970.
CREATE FUNCTION outbox_most_ahead() RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN interval '10 minutes';

CREATE FUNCTION outbox_oldest() RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN interval '6 days';

CREATE FUNCTION outbox_timely(id uuid) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN uuid_send(id) < int8send((date_part('epoch', clock_timestamp() + outbox_most_ahead()) * 1000)::bigint << 16)
        AND uuid_send(id) > int8send((date_part('epoch', clock_timestamp() - outbox_oldest()) * 1000)::bigint << 16);

-- Header names must not be able to become AMQP properties or RabbitMQ's own headers (CC, x-*): see internal/messaging.
-- +goose StatementBegin
CREATE FUNCTION outbox_headers_valid(headers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog AS $$
BEGIN
    IF jsonb_typeof(headers) <> 'object' THEN
        RETURN false;
    END IF;
    RETURN (
        SELECT count(*) <= 32 AND bool_and(name ~ '^[a-z0-9][a-z0-9-]{0,63}$' AND name !~ '^x-' AND name <> 'message-key' AND jsonb_typeof(value) = 'string'
                                           AND octet_length(value #>> '{}') <= 1024)
        FROM jsonb_each(headers) AS header (name, value));
END
$$;
-- +goose StatementEnd

-- Whether a message could be published. The conditions are no CHECKs of the table, because Postgres reads and prepares the stored text of each CHECK anew
-- for every INSERT, which took longer than the row. As one SQL expression they become part of what calls them, and nothing but what follows writes to
-- the tables.
CREATE FUNCTION outbox_accepts(id uuid, type text, key text, payload bytea, headers jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN get_byte(uuid_send(id), 6) >> 4 = 7
        AND octet_length(type) <= 255 AND type ~ '^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$'
        AND octet_length(key) <= 255
        AND octet_length(payload) <= 1048576
        AND (coalesce(headers, '{}') = '{}' OR outbox_headers_valid(headers));

-- Says what is wrong with a message that is not accepted, under the name that a constraint would have.
-- +goose StatementBegin
CREATE FUNCTION outbox_refuse(id uuid, type text, key text, payload bytea, headers jsonb) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    made_at CONSTANT timestamptz := to_timestamp(('x' || encode(substring(uuid_send(id) FOR 6), 'hex'))::bit(48)::bigint / 1000.0);
    problem text[] := CASE
        WHEN get_byte(uuid_send(id), 6) >> 4 <> 7 THEN '{message_id_is_uuidv7,the id is not a UUIDv7}'
        WHEN octet_length(key) > 255 THEN '{key_fits,the key has more than 255 bytes}'
        WHEN octet_length(payload) > 1048576 THEN '{payload_fits,the payload has more than 1048576 bytes}'
        WHEN coalesce(headers, '{}') <> '{}' AND NOT public.outbox_headers_valid(headers) THEN ARRAY['headers_are_valid',
            'the headers are not at most 32 strings of at most 1024 bytes each, with names of a-z, 0-9 and dash that are neither x-... nor message-key']
        WHEN octet_length(type) > 255 OR type !~ '^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$'
            THEN '{type_is_protobuf_name,the type is not a protobuf full name of at most 255 bytes}'
    END;
BEGIN
    IF problem IS NULL AND NOT public.outbox_timely(id) THEN -- not the message is wrong, but a clock
        RAISE object_not_in_prerequisite_state USING TABLE = 'outbox', CONSTRAINT = 'outbox_message_id_is_timely', MESSAGE = format(
            'message %s was dated %s by its writer, and it is %s by Postgres'' clock: consumers could not tell its copies; set the clock that is wrong',
            id, to_char(made_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'), to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'));
    END IF;
    IF problem IS NULL THEN
        RETURN true; -- something is NULL, which the table will refuse
    END IF;
    RAISE check_violation USING MESSAGE = 'invalid message: ' || problem[2], TABLE = 'outbox', CONSTRAINT = 'outbox_' || problem[1];
END
$$;
-- +goose StatementEnd

CREATE TABLE outbox (
    slot       smallint    NOT NULL DEFAULT outbox_slot(clock_timestamp()),
    -- Stands before id so that the transaction has its xid before the id is drawn. The reader's page query relies on it for
    -- speed (never for correctness): ids of transactions that began after a snapshot are larger than all ids in it.
    xid        xid8        NOT NULL DEFAULT pg_current_xact_id(),
    id         bigint      NOT NULL GENERATED ALWAYS AS IDENTITY (CACHE 1),
    shard      smallint    NOT NULL,
    message_id uuid        NOT NULL,
    type       text        NOT NULL,
    key        text        NOT NULL DEFAULT '',
    payload    bytea       NOT NULL,
    headers    jsonb       NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- For the pages of a large batch, in the order of id.
    CONSTRAINT outbox_pkey PRIMARY KEY (shard, id, slot)
) PARTITION BY LIST (slot);

-- +goose StatementBegin
DO $$
BEGIN
    FOR slot IN 0..outbox_slots() - 1 LOOP
        EXECUTE format('CREATE TABLE outbox_slot_%s PARTITION OF outbox FOR VALUES IN (%s)', slot, slot);
    END LOOP;
END
$$;
-- +goose StatementEnd

-- For finding what became visible since a snapshot: a range of xids, and the few that were under way.
CREATE INDEX outbox_xid_idx ON outbox (shard, xid, id);

-- For finding a message by the time in its ID. It costs writers next to nothing: one entry for 128 pages.
CREATE INDEX outbox_created_at_idx ON outbox USING brin (created_at);

-- The way into the log, for Go and for every other language: INSERT INTO outbox_message. Nothing can be read through it. Inserting into the table would
-- miss the key locks, and with them the order per key, so nobody may: the rule has its owner's rights to the table, and only to that. All names in it were
-- resolved when it was made, so the caller's search_path decides nothing. An INSERT of several rows locks their keys in the order of the rows.
--
-- It is a rule and not a function because it becomes part of the caller's statement, and is prepared and planned with it, once a connection. A function
-- runs a statement of its own within another, which takes half as much of the server's processor time again (measured).
--
-- Who has checked a message already, as outbox.Insert has, says so by a literal true in the column checked: then the
-- plan is without the check, which takes as long as the row. It gives the time in the ID as made_at, which is compared
-- with this database's clock: only the database can. The relay checks every message again before it publishes it, and
-- parks what it could not publish.
CREATE VIEW outbox_message AS SELECT message_id AS id, type, key, payload, headers, false AS checked, created_at AS made_at FROM outbox WHERE false;
-- There is no default for id: of an INSERT with several rows it might be evaluated once for all of them.
ALTER VIEW outbox_message ALTER COLUMN checked SET DEFAULT false;

CREATE RULE outbox_message_insert AS ON INSERT TO outbox_message DO INSTEAD
    INSERT INTO outbox (shard, message_id, type, key, payload, headers)
    SELECT outbox_shard(coalesce(key, ''), id), id, type, coalesce(key, ''), payload, coalesce(headers, '{}')
    -- What the caller gives for a column is evaluated once: OFFSET keeps Postgres from taking the subquery apart.
    FROM (SELECT NEW.id, NEW.type, NEW.key, NEW.payload, NEW.headers, NEW.made_at OFFSET 0) AS message (id, type, key, payload, headers, made_at)
    WHERE (CASE WHEN NEW.checked THEN made_at < clock_timestamp() + outbox_most_ahead() AND made_at > clock_timestamp() - outbox_oldest()
                ELSE outbox_accepts(id, type, key, payload, headers) AND outbox_timely(id) END OR outbox_refuse(id, type, key, payload, headers))
        -- Held to the end of the transaction: whoever writes the same key next draws its id after this commit is visible. WHERE comes before the
        -- defaults are computed, and among them the id. 1869968482 is 'outb' in ASCII, a class of our own among advisory locks. Two keys with one
        -- hash only wait for each other.
        AND (coalesce(key, '') = '' OR pg_advisory_xact_lock(1869968482, hashtext(key)) IS NOT NULL);

-- The same as a function, for callers whose statements are not prepared, as through a pooler: this one keeps its plan in the session. Returns the ID.
-- +goose StatementBegin
CREATE FUNCTION outbox_insert(type text, key text, payload bytea, headers jsonb DEFAULT '{}', id uuid DEFAULT outbox_uuidv7()) RETURNS uuid
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.outbox_message (id, type, key, payload, headers) VALUES (id, type, key, payload, headers);
    RETURN id;
END
$$;
-- +goose StatementEnd

-- Writes many messages, in the order of the arrays. It locks their keys in sorted order, so that two calls cannot wait for each other.
-- +goose StatementBegin
CREATE FUNCTION outbox_insert(ids uuid[], types text[], keys text[], payloads bytea[], headers jsonb[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE -- once for all; see outbox_timely
    oldest CONSTANT bytea := int8send((date_part('epoch', clock_timestamp() - outbox_oldest()) * 1000)::bigint << 16);
    newest CONSTANT bytea := int8send((date_part('epoch', clock_timestamp() + outbox_most_ahead()) * 1000)::bigint << 16);
BEGIN
    PERFORM pg_advisory_xact_lock(1869968482, lock.hash)
    FROM (SELECT DISTINCT hashtext(key) AS hash FROM unnest(keys) AS key WHERE key <> '' ORDER BY hash) AS lock;

    INSERT INTO outbox (shard, message_id, type, key, payload, headers)
    SELECT outbox_shard(coalesce(message.key, ''), message.id), message.id, message.type, coalesce(message.key, ''), message.payload,
        coalesce(message.headers, '{}')
    FROM unnest(ids, types, keys, payloads, headers) WITH ORDINALITY AS message (id, type, key, payload, headers, position)
    WHERE outbox_accepts(message.id, message.type, message.key, message.payload, message.headers) AND uuid_send(message.id) BETWEEN oldest AND newest
        OR outbox_refuse(message.id, message.type, message.key, message.payload, message.headers)
    ORDER BY message.position;
END
$$;
-- +goose StatementEnd

-- Where the relay is, one row a shard.
CREATE TABLE outbox_cursor (
    shard            smallint    NOT NULL CONSTRAINT outbox_cursor_pkey PRIMARY KEY,
    -- Shards are made a generation at a time. Those of the next one are not read before all of this one are drained.
    generation       integer     NOT NULL DEFAULT 0,
    -- No transaction writes to the shard any more; and everything in it is delivered.
    retired          boolean     NOT NULL DEFAULT false,
    drained          boolean     NOT NULL DEFAULT false,
    -- The cluster whose transaction IDs the snapshots are made of. After a dump and restore they mean nothing, and the relay
    -- refuses to run rather than to skip.
    system_identifier bigint     NOT NULL,
    -- Everything visible in this snapshot is delivered; so is what is visible in batch up to last_id.
    delivered        pg_snapshot NOT NULL,
    batch            pg_snapshot,
    last_id          bigint      NOT NULL DEFAULT 0,
    -- The largest id that was ever delivered: what outbox_repair knows of rows when the snapshots mean nothing any more.
    top_id           bigint      NOT NULL DEFAULT 0,
    -- The newest snapshot of which something may have been published. Its commit proves that what it shows is durable.
    claimed          pg_snapshot,
    -- Messages published and confirmed so far, and messages parked.
    published        bigint      NOT NULL DEFAULT 0,
    parked           bigint      NOT NULL DEFAULT 0,
    -- The lease: who may move this cursor, until when by this database's clock, and for how long it was given. Each new
    -- holder raises the epoch.
    owner            text        NOT NULL DEFAULT '',
    epoch            bigint      NOT NULL DEFAULT 0,
    lease_expires_at timestamptz NOT NULL DEFAULT '-infinity',
    lease            interval    NOT NULL DEFAULT '0',
    -- Counts the moves, so that a holder notices when the row is not as it left it: after a failover that lost some.
    moves            bigint      NOT NULL DEFAULT 0,
    moved_at         timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Reports whether a row of the cursor's shard is delivered.
CREATE FUNCTION outbox_delivered(at outbox_cursor, xid xid8, id bigint) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN at.drained OR pg_visible_in_snapshot(xid, at.delivered)
        OR (at.batch IS NOT NULL AND id <= at.last_id AND pg_visible_in_snapshot(xid, at.batch));

-- Before every transaction: all that was ever written is new.
INSERT INTO outbox_cursor (shard, system_identifier, delivered)
SELECT 0, system_identifier, '1:1:' FROM pg_control_system();

-- The relays alive, so that each can work out its fair share of the shards.
CREATE TABLE outbox_relay (
    owner      text        NOT NULL CONSTRAINT outbox_relay_pkey PRIMARY KEY,
    expires_at timestamptz NOT NULL,
    lease      interval    NOT NULL,
    -- What keeps it from publishing, for people; '' if nothing does.
    problem    text        NOT NULL DEFAULT ''
);

-- Spreads the log over so many shards from now on. A message that is inserted before this commits is in a shard of the old generation,
-- one inserted after it in a new one, whose relay waits until the old ones are drained: no message of a key overtakes another.
--
-- The lock waits for every transaction that has inserted, and holds up new ones meanwhile: set a lock_timeout, and try again.
-- A shard's number is used again only after 32,000 others; by then nothing of it is in the log.
-- +goose StatementBegin
CREATE FUNCTION outbox_set_shards(shards integer) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    first integer;
BEGIN
    PERFORM needs_read_committed();
    IF shards IS NULL OR shards NOT BETWEEN 1 AND 64 THEN
        RAISE EXCEPTION 'the outbox can have 1 to 64 shards, not %', shards USING ERRCODE = 'invalid_parameter_value';
    END IF;
    LOCK TABLE outbox IN SHARE ROW EXCLUSIVE MODE;
    SELECT (max(shard) + 1) % 32000 INTO first FROM outbox_cursor WHERE generation = (SELECT max(generation) FROM outbox_cursor);
    DELETE FROM outbox_cursor WHERE drained AND shard BETWEEN first AND first + shards - 1;
    UPDATE outbox_cursor SET retired = true WHERE NOT retired;
    INSERT INTO outbox_cursor (shard, generation, system_identifier, delivered)
    SELECT first + n, (SELECT max(generation) + 1 FROM outbox_cursor), system_identifier, pg_current_snapshot()
    FROM generate_series(0, shards - 1) AS n, pg_control_system();
    PERFORM outbox_spread(first, shards);
END
$$;
-- +goose StatementEnd

-- Makes the function that spreads messages over so many shards, from the first one on.
-- +goose StatementBegin
CREATE FUNCTION outbox_spread(first integer, shards integer) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE OR REPLACE FUNCTION outbox_shard(key text, message_id uuid) RETURNS smallint LANGUAGE sql IMMUTABLE PARALLEL SAFE '
        'RETURN (%s + (hashtext(CASE key WHEN '''' THEN message_id::text ELSE key END) & 2147483647) %% %s)::smallint', first, shards);
END
$$;
-- +goose StatementEnd

-- Names the shards that new messages are put into and nobody will read. The function that spreads them is part of the
-- schema and the cursors are rows, so that one may be moved without the other. A hundred keys meet each of 64 shards
-- or, if the function is of another generation, a wrong one.
-- +goose StatementBegin
CREATE FUNCTION outbox_stray_shards() RETURNS SETOF smallint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
BEGIN ATOMIC
    SELECT DISTINCT shard FROM generate_series(1, 100) AS n, outbox_shard(n::text, gen_random_uuid()) AS shard
    WHERE shard NOT IN (SELECT outbox_cursor.shard FROM outbox_cursor WHERE NOT retired);
END;
-- +goose StatementEnd

-- Whether nothing in a slot is left to deliver. What is below the xmin of a cursor is delivered, so of each shard only the rest is looked at:
-- next to nothing, unless some transaction has been open for very long.
-- +goose StatementBegin
CREATE FUNCTION outbox_slot_delivered(part text) RETURNS boolean
    LANGUAGE plpgsql AS $$
DECLARE
    waiting boolean;
BEGIN
    EXECUTE format('SELECT EXISTS (SELECT FROM outbox_cursor AS at JOIN %I AS message USING (shard)
        WHERE NOT drained AND xid >= pg_snapshot_xmin(delivered) AND NOT pg_visible_in_snapshot(xid, delivered))', part) INTO waiting;
    RETURN NOT waiting;
END
$$;
-- +goose StatementEnd

-- Empties the slots that are delivered and past the retention, and returns them. Every relay calls it, about once a minute.
--
-- A slot's turn ends when its time is over; what came last then still has its whole retention before it. Whether all of it is delivered is
-- looked up without a lock first, since that may take long, and then again under the lock, which waits for transactions that wrote in the
-- slot's time and are open still. The lock is asked for briefly: everyone else would queue behind it.
--
-- A clock that was set back makes a slot look older than its rows are, so these are asked, too. A clock that was set
-- forward, or is behind rows by more than the ring is long, shortens the time for which delivered rows can be replayed;
-- nothing undelivered goes for any clock.
-- +goose StatementBegin
CREATE FUNCTION outbox_sweep(retention interval) RETURNS smallint[]
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    turn    CONSTANT interval := outbox_slot_length();
    present CONSTANT timestamptz := clock_timestamp();
    part    text;
    emptied smallint[] := '{}';
    young   boolean;
BEGIN
    PERFORM needs_read_committed();
    FOR age IN 1..outbox_slots() - 1 LOOP
        part := 'outbox_slot_' || outbox_slot(present - age * turn);
        BEGIN -- everything that may meet the lock of another sweep
            CONTINUE WHEN date_bin(turn, present, 'epoch') - (age - 1) * turn > present - retention
                OR pg_relation_size(part::regclass) = 0 OR NOT outbox_slot_delivered(part);
            EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE created_at > $1 AND created_at < $2)', part) INTO young
                USING present - retention, present + outbox_slots() * turn;
            CONTINUE WHEN young;
            EXECUTE format('LOCK TABLE ONLY %I IN ACCESS EXCLUSIVE MODE', part);
            IF outbox_slot_delivered(part) THEN
                EXECUTE format('TRUNCATE ONLY %I', part);
                emptied := emptied || outbox_slot(present - age * turn);
            END IF;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            NULL; -- next time
        END;
    END LOOP;
    RETURN emptied;
END
$$;
-- +goose StatementEnd

-- What waits to be delivered, a row a shard, as it was last counted.
CREATE TABLE outbox_backlog (
    shard       smallint    NOT NULL CONSTRAINT outbox_backlog_pkey PRIMARY KEY,
    messages    bigint      NOT NULL,
    -- When the first of them was inserted; NULL when there is none.
    oldest_at   timestamptz,
    measured_at timestamptz NOT NULL
);

-- Counts the backlog, unless it was counted within the interval or somebody is counting right now, and returns what is known. The relay
-- calls it every second or so, and that keeps the numbers fresh for everyone else. Reads the index entries of what is undelivered.
-- +goose StatementBegin
CREATE FUNCTION outbox_measure(stale interval) RETURNS SETOF outbox_backlog
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
    -- A session keeps the plan, and one that was made for an empty log would read all of it from then on.
    -- What must be scanned all the same looks so dear then that it would be compiled, at each call.
    SET enable_seqscan = off SET jit = off AS $$
DECLARE
    cursor   record;
    waiting  bigint;
    first_id bigint;
BEGIN
    PERFORM needs_read_committed();
    -- 1869968483 follows the class of the key locks.
    IF NOT EXISTS (SELECT FROM outbox_backlog WHERE clock_within(measured_at, stale)) AND pg_try_advisory_xact_lock(1869968483, 0) THEN
        FOR cursor IN SELECT shard, delivered, batch, last_id FROM outbox_cursor WHERE NOT drained LOOP
            SELECT count(*), min(id) INTO waiting, first_id
            FROM (
                SELECT id, xid FROM outbox WHERE shard = cursor.shard AND xid = ANY (ARRAY(SELECT pg_snapshot_xip(cursor.delivered)))
                UNION ALL
                SELECT id, xid FROM outbox WHERE shard = cursor.shard AND xid >= pg_snapshot_xmax(cursor.delivered)) AS undelivered
            WHERE cursor.batch IS NULL OR id > cursor.last_id OR NOT pg_visible_in_snapshot(xid, cursor.batch);

            INSERT INTO outbox_backlog (shard, messages, oldest_at, measured_at)
            VALUES (cursor.shard, waiting, (SELECT created_at FROM outbox WHERE shard = cursor.shard AND id = first_id), clock_timestamp())
            ON CONFLICT (shard) DO UPDATE
            SET messages = excluded.messages, oldest_at = excluded.oldest_at, measured_at = excluded.measured_at;
        END LOOP;
    END IF;
    RETURN QUERY SELECT b.* FROM outbox_backlog AS b JOIN outbox_cursor AS c USING (shard) WHERE NOT c.drained ORDER BY b.shard;
END
$$;
-- +goose StatementEnd

-- Messages that are to be inserted later: at a time, or, if only the latest of a key and type is wanted, when the time in which others may
-- replace it is over. What is accepted here is what the log accepts.
CREATE TABLE outbox_scheduled (LIKE outbox INCLUDING DEFAULTS);
ALTER TABLE outbox_scheduled
    DROP COLUMN slot, DROP COLUMN xid, DROP COLUMN id, DROP COLUMN shard,
    ADD COLUMN due_at timestamptz NOT NULL,
    ADD COLUMN latest boolean NOT NULL,
    ADD CONSTRAINT outbox_scheduled_pkey PRIMARY KEY (message_id),
    ADD CONSTRAINT outbox_scheduled_latest_has_key CHECK (NOT latest OR key <> '');
CREATE INDEX outbox_scheduled_due_idx ON outbox_scheduled (due_at, message_id);
CREATE UNIQUE INDEX outbox_scheduled_latest_idx ON outbox_scheduled (type, key) WHERE latest;

-- Where only the latest is wanted, a message takes the place of the one that waits, and its time with it: so it is never put off for ever. The row
-- stays locked until the transaction ends, so the one that commits last is the one that stays.
-- +goose StatementBegin
CREATE FUNCTION outbox_schedule(ids uuid[], types text[], keys text[], payloads bytea[], headers jsonb[], due_at timestamptz, latest boolean) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO outbox_scheduled (message_id, type, key, payload, headers, due_at, latest)
    SELECT id, type, coalesce(key, ''), payload, coalesce(header, '{}'), outbox_schedule.due_at, outbox_schedule.latest
    FROM (
        SELECT DISTINCT ON (CASE WHEN outbox_schedule.latest THEN type END, CASE WHEN outbox_schedule.latest THEN key ELSE id::text END) *
        FROM unnest(ids, types, keys, payloads, headers) WITH ORDINALITY AS message (id, type, key, payload, header, position)
        WHERE outbox_accepts(id, type, key, payload, header) OR outbox_refuse(id, type, key, payload, header)
        -- In one order, so that two calls cannot wait for each other; of several, the last.
        ORDER BY CASE WHEN outbox_schedule.latest THEN type END, CASE WHEN outbox_schedule.latest THEN key ELSE id::text END, position DESC) AS message
    ON CONFLICT (type, key) WHERE latest DO UPDATE
    SET message_id = excluded.message_id, payload = excluded.payload, headers = excluded.headers, created_at = excluded.created_at;
END
$$;
-- +goose StatementEnd

-- Takes a message back, and tells whether it was still there.
-- +goose StatementBegin
CREATE FUNCTION outbox_unschedule(id uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    DELETE FROM outbox_scheduled WHERE message_id = id;
    RETURN FOUND;
END
$$;
-- +goose StatementEnd

-- Moves what is due into the log, in the order in which it is due, and tells how many and when the next will be. One caller at a time
-- does so, or messages of a key could change places. IDs are dated anew, because an inbox remembers by the time in them.
-- +goose StatementBegin
CREATE FUNCTION outbox_move_due(most integer, OUT moved bigint, OUT next_due_at timestamptz)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM needs_read_committed();
    moved := 0;
    IF pg_try_advisory_xact_lock(1869968483, 1) THEN
        WITH due AS (
            DELETE FROM outbox_scheduled
            WHERE message_id IN (
                SELECT message_id FROM outbox_scheduled WHERE due_at <= clock_timestamp()
                ORDER BY due_at, message_id LIMIT most FOR UPDATE SKIP LOCKED)
            RETURNING *
        ), ordered AS (
            SELECT count(*) AS n, array_agg(outbox_redate(message_id) ORDER BY due_at, message_id) AS ids, array_agg(type ORDER BY due_at, message_id) AS types,
                array_agg(key ORDER BY due_at, message_id) AS keys, array_agg(payload ORDER BY due_at, message_id) AS payloads,
                array_agg(headers ORDER BY due_at, message_id) AS headers
            FROM due
        )
        SELECT n INTO moved FROM ordered, LATERAL (SELECT outbox_insert(ids, types, keys, payloads, headers)) AS inserted WHERE n > 0;
        moved := coalesce(moved, 0);
    END IF;
    SELECT min(due_at) INTO next_due_at FROM outbox_scheduled;
END
$$;
-- +goose StatementEnd

-- After the database was moved into another cluster, makes the log and its cursors mean something there, and returns
-- how many messages are to be published. What the cursors know as delivered stays so; everything else, all that was
-- written since the move included, is published, maybe again. Returns NULL if nothing is amiss.
--
-- What does not travel with the rows is put right first: sequences, if they stayed behind, and the function that
-- spreads messages over the shards. Then the snapshots. They still say of moved rows which were delivered, but not of
-- rows written since: these have ids above all that was delivered, or, if the sequence began anew, ids up to the last
-- one drawn; and they are younger than the last move of the cursor. What is not known to be delivered by all of these
-- signs is published.
--
-- Lower than any real xid is 3, the first of them; delivered rows get that one. What is left gets this transaction's,
-- and as a cursor a snapshot that sees all below it: the lock makes sure that nobody else is writing. If ids were drawn
-- twice, they are drawn once more, in the order of time.
-- +goose StatementBegin
CREATE FUNCTION outbox_repair() RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    here    CONSTANT bigint := (SELECT system_identifier FROM pg_control_system());
    me      CONSTANT xid8 := pg_current_xact_id();
    one     record;
    again   bigint; -- ids up to this one were drawn twice
    amiss   boolean := false;
    problem text;
    kept    bigint;
BEGIN
    PERFORM needs_read_committed();
    -- The outbox last, as every writer locks it.
    FOR one IN SELECT * FROM sequences_behind() ORDER BY owner = 'outbox'::regclass LOOP
        EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', one.owner);
        SELECT CASE col WHEN 'outbox.id' THEN drawn END INTO again FROM sequences_behind() WHERE seq = one.seq;
        PERFORM setval(seq, used) FROM sequences_behind() WHERE seq = one.seq;
        amiss := true;
    END LOOP;
    LOCK TABLE outbox IN SHARE ROW EXCLUSIVE MODE;
    PERFORM FROM outbox_cursor FOR UPDATE;
    SELECT CASE
        WHEN count(*) FILTER (WHERE NOT retired) = 0 THEN 'outbox_cursor has no shard that is written to: copy its rows, too, and try again'
        WHEN max(moved_at) FILTER (WHERE system_identifier <> here) > clock_timestamp() THEN format(
            'the cursor was moved at %s, which is yet to come by this cluster''s clock, so that what was written since cannot be told from what '
            'was delivered before: set the clock, or try again after that', max(moved_at))
    END INTO problem FROM outbox_cursor;
    IF problem IS NOT NULL THEN
        RAISE object_not_in_prerequisite_state USING MESSAGE = problem;
    END IF;
    IF EXISTS (SELECT FROM outbox_stray_shards()) THEN
        PERFORM outbox_spread(min(shard), count(*)::integer) FROM outbox_cursor WHERE NOT retired;
        amiss := true;
    END IF;
    IF NOT amiss AND NOT EXISTS (SELECT FROM outbox_cursor WHERE system_identifier <> here) THEN
        RETURN NULL;
    END IF;
    UPDATE outbox SET xid = CASE WHEN EXISTS (
            SELECT FROM outbox_cursor AS at
            WHERE at.shard = outbox.shard
                AND outbox_delivered(at, outbox.xid, outbox.id)
                AND (system_identifier = here AND NOT drained OR id <= top_id AND id > coalesce(again, 0) AND created_at <= moved_at)
        ) THEN '3' ELSE me END;
    WITH taken AS (
        DELETE FROM outbox WHERE xid = me RETURNING *
    )
    INSERT INTO outbox (slot, shard, message_id, type, key, payload, headers, created_at)
    SELECT slot, CASE WHEN shard IN (SELECT at.shard FROM outbox_cursor AS at WHERE NOT drained) THEN shard ELSE outbox_shard(key, message_id) END,
        message_id, type, key, payload, headers, created_at
    FROM taken ORDER BY CASE WHEN again IS NULL THEN id END, created_at, id;
    GET DIAGNOSTICS kept = ROW_COUNT;
    UPDATE outbox_cursor
    SET system_identifier = here, delivered = format('%s:%s:', me, me)::pg_snapshot, batch = NULL, last_id = 0, claimed = NULL,
        owner = '', epoch = epoch + 1, lease_expires_at = '-infinity', moves = moves + 1, moved_at = clock_timestamp();
    RETURN kept;
END
$$;
-- +goose StatementEnd

-- What could not be published or applied, with everything needed to look at it and to send it again. A letter stays for ever; what
-- changes is whether it is resolved.
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
    dead_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- What became of it: sent again, given up, or found to be a copy of something that is taken care of. NULL while it is open.
    resolution text        CONSTRAINT dead_letter_resolution_is_known CHECK (resolution IN ('redriven', 'discarded', 'duplicate')),
    resolved_at timestamptz,
    CONSTRAINT dead_letter_is_open_or_resolved CHECK ((resolution IS NULL) = (resolved_at IS NULL))
);
CREATE INDEX dead_letter_open_idx ON dead_letter (id) WHERE resolution IS NULL;
CREATE INDEX dead_letter_message_id_idx ON dead_letter (message_id);

-- Who resolved a letter, and why.
CREATE TABLE dead_letter_audit (
    id        bigint      NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT dead_letter_audit_pkey PRIMARY KEY,
    letter_id bigint      NOT NULL CONSTRAINT dead_letter_audit_letter_id_fkey REFERENCES dead_letter,
    resolution text       NOT NULL,
    reason    text        NOT NULL CONSTRAINT dead_letter_audit_reason_is_given CHECK (reason <> ''),
    actor     text        NOT NULL CONSTRAINT dead_letter_audit_actor_is_given CHECK (actor <> ''),
    detail    text        NOT NULL DEFAULT '',
    at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX dead_letter_audit_letter_id_idx ON dead_letter_audit (letter_id);

-- Nothing leaves silently, not even by a mistake at the psql prompt.
-- +goose StatementBegin
CREATE FUNCTION dead_letter_guard() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND to_jsonb(NEW) - '{resolution,resolved_at}'::text[] = to_jsonb(OLD) - '{resolution,resolved_at}'::text[] THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'dead letters are neither changed nor deleted: redrive or discard them'
        USING HINT = 'Use the commands "dead redrive" and "dead discard", which keep a record.';
END
$$;
-- +goose StatementEnd
CREATE TRIGGER dead_letter_guard_rows BEFORE UPDATE OR DELETE ON dead_letter FOR EACH ROW EXECUTE FUNCTION dead_letter_guard();
CREATE TRIGGER dead_letter_guard_table BEFORE TRUNCATE ON dead_letter FOR EACH STATEMENT EXECUTE FUNCTION dead_letter_guard();
CREATE TRIGGER dead_letter_audit_guard_rows BEFORE UPDATE OR DELETE ON dead_letter_audit FOR EACH ROW EXECUTE FUNCTION dead_letter_guard();
CREATE TRIGGER dead_letter_audit_guard_table BEFORE TRUNCATE ON dead_letter_audit FOR EACH STATEMENT EXECUTE FUNCTION dead_letter_guard();

-- Writers reach the tables through a view and functions alone, which have their owner's rights: nobody can write past the key locks, or
-- read what others sent.
REVOKE EXECUTE ON FUNCTION
    outbox_insert(uuid[], text[], text[], bytea[], jsonb[]), outbox_schedule, outbox_unschedule,
    outbox_measure, outbox_sweep, outbox_move_due, outbox_set_shards, outbox_repair, sequences_behind, outbox_stray_shards
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    outbox_insert(uuid[], text[], text[], bytea[], jsonb[]), outbox_schedule, outbox_unschedule
    TO shop_api, shop_consumer, shop_operator;
GRANT INSERT ON outbox_message TO shop_api, shop_consumer, shop_operator;
GRANT EXECUTE ON FUNCTION outbox_measure TO shop_api, shop_relay, shop_operator;
GRANT EXECUTE ON FUNCTION outbox_sweep, outbox_move_due TO shop_relay;
GRANT EXECUTE ON FUNCTION outbox_set_shards, outbox_repair TO shop_operator;
GRANT EXECUTE ON FUNCTION sequences_behind, outbox_stray_shards TO shop_relay, shop_consumer, shop_operator;

GRANT SELECT ON outbox TO shop_relay;
GRANT SELECT, UPDATE ON outbox_cursor TO shop_relay;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relay TO shop_relay;
GRANT INSERT, SELECT (consumer, reason, resolution) ON dead_letter TO shop_relay;
GRANT SELECT, INSERT ON dead_letter TO shop_consumer;
GRANT SELECT ON outbox, outbox_cursor, outbox_relay, outbox_backlog, outbox_scheduled, dead_letter, dead_letter_audit TO shop_operator;
-- A process is not ready before the schema is the one that it was built for.
GRANT SELECT ON goose_db_version TO shop_api, shop_relay, shop_consumer, shop_operator;
GRANT UPDATE (resolution, resolved_at) ON dead_letter TO shop_operator;
GRANT INSERT ON dead_letter_audit TO shop_operator;

-- +goose Down
DROP FUNCTION outbox_repair, outbox_delivered, outbox_unschedule, outbox_move_due, outbox_schedule, outbox_measure, outbox_sweep, outbox_slot_delivered, outbox_set_shards,
    outbox_stray_shards, outbox_spread;
DROP VIEW outbox_message;
DROP TABLE dead_letter_audit, dead_letter, outbox_scheduled, outbox_backlog, outbox_relay, outbox_cursor, outbox;
DROP FUNCTION dead_letter_guard;
DROP FUNCTION outbox_insert(text, text, bytea, jsonb, uuid);
DROP FUNCTION outbox_insert(uuid[], text[], text[], bytea[], jsonb[]);
DROP FUNCTION outbox_accepts, outbox_refuse, outbox_headers_valid, outbox_timely, outbox_most_ahead, outbox_oldest, outbox_uuidv7, outbox_redate,
    outbox_shard, outbox_slot, outbox_slot_length, outbox_slots, sequences_behind, needs_read_committed, clock_age, clock_within, clock_holds;
