-- The outbox: an append-only log that relays read by snapshot. Package internal/outbox explains why they skip nothing.

-- +goose Up

-- Login roles. Each process logs in as one of them and has exactly the privileges that its code needs; shop_all is for
-- a single process that does everything. Roles belong to the whole cluster. They have no passwords: set passwords, or
-- configure another method of authentication in pg_hba.conf.
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
                NULL; -- a migration of another database has just created the role
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION 'role % does not exist, and % may not create it', name, current_user
                    USING HINT = 'As a superuser: CREATE ROLE ' || name || ' LOGIN, or ALTER ROLE ' || current_user
                        || ' CREATEROLE.';
        END;
    END LOOP;
END
$$;
-- +goose StatementEnd

-- Clocks step. If the clock is set back, a time that was stored before is in the future, and would block work until
-- the clock reaches it again. So these functions trust a stored time only as far as it can be true, and never further
-- in the future than its own interval. Compare stored times with the present only through them; a test in
-- internal/dev/architecture lists the exceptions.

-- Reports whether a lease or heartbeat is valid that expires at expires_at and was granted for the interval lease.
CREATE FUNCTION clock_holds(expires_at timestamptz, lease interval) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN expires_at > clock_timestamp() AND expires_at <= clock_timestamp() + lease;

-- Reports whether something happened less than span ago, and not more than span in the future.
CREATE FUNCTION clock_within(happened_at timestamptz, span interval) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN happened_at > clock_timestamp() - span AND happened_at < clock_timestamp() + span;

-- Returns how long ago something happened, and zero for a time in the future.
CREATE FUNCTION clock_age(happened_at timestamptz) RETURNS interval
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN greatest(clock_timestamp() - happened_at, interval '0');

-- Raises an error unless the transaction is READ COMMITTED, so that each statement sees everything committed before it.
-- Functions that wait for a lock and then look again depend on that: under REPEATABLE READ they would look at an old
-- snapshot, and drop or forget rows that were committed while they waited. Each of them calls this function first.
-- +goose StatementBegin
CREATE FUNCTION needs_read_committed() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE invalid_transaction_state USING
            MESSAGE = format('the transaction is %s, but this function requires READ COMMITTED',
                upper(current_setting('transaction_isolation'))),
            HINT = 'BEGIN ISOLATION LEVEL READ COMMITTED';
    END IF;
END
$$;
-- +goose StatementEnd

-- Returns the columns of the schema whose sequence is behind: the last number drawn is less than the largest number in
-- use, so the sequence will hand out numbers twice. Backups and physical standbys include sequences; logical
-- replication and copies of the rows do not. The columns come from the catalog, so new tables need no change here. The
-- largest number in use is read before the sequence, so concurrent inserts cause no false alarm.
-- +goose StatementBegin
CREATE FUNCTION sequences_behind() RETURNS TABLE (col text, owner regclass, seq regclass, drawn bigint, used bigint)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    numbered record;
BEGIN
    FOR numbered IN
        SELECT attrelid::regclass AS of, attname, seqrelid::regclass AS sequence, seqstart
        FROM pg_depend
        JOIN pg_sequence ON seqrelid = objid
        JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
        JOIN pg_class ON pg_class.oid = attrelid
        WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass AND deptype IN ('a', 'i')
            AND relnamespace = 'public'::regnamespace AND seqincrement > 0
        ORDER BY attrelid::regclass::text, attname
    LOOP
        IF numbered.of = 'outbox'::regclass THEN -- use the index, and include delivered rows that a sweep removed
            SELECT greatest(max(top_id), max((SELECT max(id) FROM outbox WHERE outbox.shard = outbox_cursor.shard)))
            INTO used FROM outbox_cursor;
        ELSE
            EXECUTE format('SELECT max(%I)::bigint FROM %s', numbered.attname, numbered.of) INTO used;
        END IF;
        drawn := coalesce(pg_sequence_last_value(numbered.sequence), numbered.seqstart - 1);
        IF drawn < used THEN
            col := numbered.of || '.' || numbered.attname;
            owner := numbered.of;
            seq := numbered.sequence;
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
-- +goose StatementEnd

-- The log is a ring of five time slots of eight hours each; a slot is a partition. A sweep truncates a slot as a whole
-- when every row in it is delivered and past its retention, so the log never needs a DELETE and never bloats. There are
-- only five slots, because every read opens all of them.
CREATE FUNCTION outbox_slots() RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 5;

CREATE FUNCTION outbox_slot_length() RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN interval '8 hours';

-- Returns the slot of a row that is inserted at the given time.
--
-- The function computes with an interval since the epoch, because date_part() of a timestamptz is only STABLE: Postgres
-- does not inline an IMMUTABLE function that calls a STABLE one, and would plan this function again for every insert,
-- at a third of the insert's cost. date_part() returns floating point, which is exact enough and cheaper than the
-- numeric of extract().
CREATE FUNCTION outbox_slot(at timestamptz) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (floor(date_part('epoch', at - timestamptz '1970-01-01 00:00:00+00')
        / date_part('epoch', outbox_slot_length()))::bigint % outbox_slots())::smallint;

-- Returns the shard of a message. There is a single shard, 0, until outbox_set_shards replaces this function. All
-- messages of a key go to the same shard.
CREATE FUNCTION outbox_shard(key text, message_id uuid) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 0::smallint;

-- Replaces the time in an ID by the current time: 48 bits of Unix milliseconds, and version 7 (RFC 9562, section 5.7).
-- The random bits stay. Only the last two bits of the version are set here, so the ID must have version 4 (0100) or
-- 7 (0111); the variant is the same for all versions.
CREATE FUNCTION outbox_redate(id uuid) RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN encode(set_bit(set_bit(overlay(uuid_send(id)
        PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
        FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid;

-- Returns a new UUIDv7, for writers without a library that generates one.
CREATE FUNCTION outbox_uuidv7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN outbox_redate(gen_random_uuid());

-- Limits for the time in a message's UUIDv7, by this database's clock. If the time is further ahead, the writer's clock
-- must be wrong; if it is older, an inbox may have forgotten copies of the message. Consumers accept every ID within
-- these limits, with a margin at both ends: see inbox.ring.
CREATE FUNCTION outbox_most_ahead() RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN interval '10 minutes';

CREATE FUNCTION outbox_oldest() RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN interval '6 days';

-- Reports whether the time in a UUIDv7 is within the limits. It compares the leading bytes of the ID, which are the
-- milliseconds since 1970.
CREATE FUNCTION outbox_timely(id uuid) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN uuid_send(id) < int8send((date_part('epoch', clock_timestamp() + outbox_most_ahead()) * 1000)::bigint << 16)
        AND uuid_send(id) > int8send((date_part('epoch', clock_timestamp() - outbox_oldest()) * 1000)::bigint << 16);

-- Reports whether headers are valid. A header name must not become an AMQP property or one of RabbitMQ's own headers
-- (CC, x-*): see internal/messaging.
-- +goose StatementBegin
CREATE FUNCTION outbox_headers_valid(headers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog AS $$
BEGIN
    IF jsonb_typeof(headers) <> 'object' THEN
        RETURN false;
    END IF;
    RETURN (
        SELECT count(*) <= 32 AND bool_and(
            name ~ '^[a-z0-9][a-z0-9-]{0,63}$' AND name !~ '^x-' AND name <> 'message-key'
            AND jsonb_typeof(value) = 'string' AND octet_length(value #>> '{}') <= 1024)
        FROM jsonb_each(headers) AS header (name, value));
END
$$;
-- +goose StatementEnd

-- Reports whether a message can be published. These conditions are not CHECK constraints, because Postgres parses and
-- prepares each CHECK again for every INSERT, which took longer than writing the row. As a single SQL expression, this
-- function is inlined into its caller. Only the rule and the functions below write to the tables.
CREATE FUNCTION outbox_accepts(id uuid, type text, key text, payload bytea, headers jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN get_byte(uuid_send(id), 6) >> 4 = 7
        AND octet_length(type) <= 255 AND type ~ '^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$'
        AND octet_length(key) <= 255
        AND octet_length(payload) <= 1048576
        AND (coalesce(headers, '{}') = '{}' OR outbox_headers_valid(headers));

-- Raises an error that explains why a message is not accepted, under the name that a CHECK constraint would have.
-- +goose StatementBegin
CREATE FUNCTION outbox_refuse(id uuid, type text, key text, payload bytea, headers jsonb) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    made_at CONSTANT timestamptz :=
        to_timestamp(('x' || encode(substring(uuid_send(id) FOR 6), 'hex'))::bit(48)::bigint / 1000.0);
    problem text[] := CASE
        WHEN get_byte(uuid_send(id), 6) >> 4 <> 7 THEN '{message_id_is_uuidv7,the id is not a UUIDv7}'
        WHEN octet_length(key) > 255 THEN '{key_fits,the key has more than 255 bytes}'
        WHEN octet_length(payload) > 1048576 THEN '{payload_fits,the payload has more than 1048576 bytes}'
        WHEN coalesce(headers, '{}') <> '{}' AND NOT public.outbox_headers_valid(headers)
            THEN ARRAY['headers_are_valid', 'the headers must be at most 32 strings of at most 1024 bytes each; '
                'their names must consist of a-z, 0-9 and dash, and must not be message-key or begin with x-']
        WHEN octet_length(type) > 255 OR type !~ '^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$'
            THEN '{type_is_protobuf_name,the type is not a protobuf full name of at most 255 bytes}'
    END;
BEGIN
    IF problem IS NULL AND NOT public.outbox_timely(id) THEN -- the message is fine, but a clock is wrong
        RAISE object_not_in_prerequisite_state USING TABLE = 'outbox', CONSTRAINT = 'outbox_message_id_is_timely',
            MESSAGE = format(
                'the ID of message %s was made at %s by the writer''s clock, but it is %s by Postgres'' clock: '
                'consumers could not recognize copies of the message; fix the clock that is wrong',
                id, to_char(made_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'),
                to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'));
    END IF;
    IF problem IS NULL THEN
        RETURN true; -- a column is NULL, which the table refuses
    END IF;
    RAISE check_violation USING MESSAGE = 'invalid message: ' || problem[2],
        TABLE = 'outbox', CONSTRAINT = 'outbox_' || problem[1];
END
$$;
-- +goose StatementEnd

CREATE TABLE outbox (
    slot       smallint    NOT NULL DEFAULT outbox_slot(clock_timestamp()),
    -- xid precedes id, so the transaction has its xid before the id is drawn. It follows that transactions which began
    -- after a snapshot draw larger ids than any in it. The relay's page query relies on that for speed, never for
    -- correctness.
    xid        xid8        NOT NULL DEFAULT pg_current_xact_id(),
    id         bigint      NOT NULL GENERATED ALWAYS AS IDENTITY (CACHE 1),
    shard      smallint    NOT NULL,
    message_id uuid        NOT NULL,
    type       text        NOT NULL,
    key        text        NOT NULL DEFAULT '',
    payload    bytea       NOT NULL,
    headers    jsonb       NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Serves the pages of a large batch, in the order of id.
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

-- Finds the rows that became visible since a snapshot: a range of xids, and the few that were in progress.
CREATE INDEX outbox_xid_idx ON outbox (shard, xid, id);

-- Finds a message by the time in its ID. It costs writers almost nothing: one entry for 128 heap pages.
CREATE INDEX outbox_created_at_idx ON outbox USING brin (created_at);

-- Writers insert into the log through this view, in Go and in every other language: INSERT INTO outbox_message. It
-- returns no rows. An insert into the table would bypass the key locks, and with them the order per key, so no role has
-- that privilege: the rule runs with its owner's privileges on the table, and on nothing else. The names in the rule
-- were resolved when it was created, so the caller's search_path has no effect. An INSERT of several rows locks their
-- keys in the order of the rows.
--
-- A rule becomes part of the caller's statement, and is prepared and planned with it, once per connection. A function
-- would run a second statement within the first, which takes half as much CPU time in the server again (measured).
--
-- A caller that has checked the message already, as outbox.Insert has, sets the column checked to a literal true. Then
-- the plan omits the check, which takes as long as writing the row. Such a caller passes the time in the ID as made_at:
-- only the database can compare it with the database's clock. The relay checks every message again before it publishes
-- it, and parks messages that it cannot publish.
CREATE VIEW outbox_message AS
SELECT message_id AS id, type, key, payload, headers, false AS checked, created_at AS made_at FROM outbox WHERE false;
-- The column id has no default: for an INSERT of several rows, Postgres might evaluate the default only once.
ALTER VIEW outbox_message ALTER COLUMN checked SET DEFAULT false;

CREATE RULE outbox_message_insert AS ON INSERT TO outbox_message DO INSTEAD
    INSERT INTO outbox (shard, message_id, type, key, payload, headers)
    SELECT outbox_shard(coalesce(key, ''), id), id, type, coalesce(key, ''), payload, coalesce(headers, '{}')
    -- OFFSET keeps Postgres from flattening the subquery, so each expression of the caller is evaluated only once.
    FROM (SELECT NEW.id, NEW.type, NEW.key, NEW.payload, NEW.headers, NEW.made_at OFFSET 0)
        AS message (id, type, key, payload, headers, made_at)
    WHERE (CASE WHEN NEW.checked
                THEN made_at < clock_timestamp() + outbox_most_ahead() AND made_at > clock_timestamp() - outbox_oldest()
                ELSE outbox_accepts(id, type, key, payload, headers) AND outbox_timely(id) END
            OR outbox_refuse(id, type, key, payload, headers))
        -- The key stays locked until the transaction ends, so the next writer of the key draws its id after this commit
        -- is visible. WHERE is evaluated before the defaults, of which the id is one. 1869968482 is 'outb' in ASCII, a
        -- class of advisory locks that only this schema uses. Two keys with the same hash merely wait for each other.
        AND (coalesce(key, '') = '' OR pg_advisory_xact_lock(1869968482, hashtext(key)) IS NOT NULL);

-- The same as a function, for callers that do not prepare statements, for example because of a pooler: the session
-- caches the function's plan. Returns the ID.
-- +goose StatementBegin
CREATE FUNCTION outbox_insert(
    type text, key text, payload bytea, headers jsonb DEFAULT '{}', id uuid DEFAULT outbox_uuidv7()) RETURNS uuid
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.outbox_message (id, type, key, payload, headers) VALUES (id, type, key, payload, headers);
    RETURN id;
END
$$;
-- +goose StatementEnd

-- Inserts many messages, in the order of the arrays. It locks their keys in sorted order, so that two calls cannot
-- deadlock.
-- +goose StatementBegin
CREATE FUNCTION outbox_insert(ids uuid[], types text[], keys text[], payloads bytea[], headers jsonb[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE -- computed once for all messages; see outbox_timely
    oldest CONSTANT bytea :=
        int8send((date_part('epoch', clock_timestamp() - outbox_oldest()) * 1000)::bigint << 16);
    newest CONSTANT bytea :=
        int8send((date_part('epoch', clock_timestamp() + outbox_most_ahead()) * 1000)::bigint << 16);
BEGIN
    PERFORM pg_advisory_xact_lock(1869968482, lock.hash)
    FROM (SELECT DISTINCT hashtext(key) AS hash FROM unnest(keys) AS key WHERE key <> '' ORDER BY hash) AS lock;

    INSERT INTO outbox (shard, message_id, type, key, payload, headers)
    SELECT outbox_shard(coalesce(message.key, ''), message.id), message.id, message.type, coalesce(message.key, ''),
        message.payload, coalesce(message.headers, '{}')
    FROM unnest(ids, types, keys, payloads, headers)
        WITH ORDINALITY AS message (id, type, key, payload, headers, position)
    WHERE outbox_accepts(message.id, message.type, message.key, message.payload, message.headers)
            AND uuid_send(message.id) BETWEEN oldest AND newest
        OR outbox_refuse(message.id, message.type, message.key, message.payload, message.headers)
    ORDER BY message.position;
END
$$;
-- +goose StatementEnd

-- The positions of the relays: one cursor per shard.
CREATE TABLE outbox_cursor (
    shard            smallint    NOT NULL CONSTRAINT outbox_cursor_pkey PRIMARY KEY,
    -- Shards are created in generations. Relays read a generation only after all shards of the one before are drained.
    generation       integer     NOT NULL DEFAULT 0,
    -- Retired: no transaction writes to the shard any more. Drained: everything in it is delivered.
    retired          boolean     NOT NULL DEFAULT false,
    drained          boolean     NOT NULL DEFAULT false,
    -- The cluster whose transaction IDs the snapshots contain. After a dump and restore the snapshots mean nothing, and
    -- the relay refuses to run rather than skip messages.
    system_identifier bigint     NOT NULL,
    -- Every row visible in delivered is delivered, and so is every row visible in batch up to last_id.
    delivered        pg_snapshot NOT NULL,
    batch            pg_snapshot,
    last_id          bigint      NOT NULL DEFAULT 0,
    -- The largest id ever delivered. outbox_repair needs it when the snapshots mean nothing any more.
    top_id           bigint      NOT NULL DEFAULT 0,
    -- The newest snapshot from which rows may have been published. Once the claim is committed, the rows that the
    -- snapshot shows are durable.
    claimed          pg_snapshot,
    -- Counts of messages published and confirmed, and of messages parked.
    published        bigint      NOT NULL DEFAULT 0,
    parked           bigint      NOT NULL DEFAULT 0,
    -- The lease: which relay may move this cursor, until when by this database's clock, and for how long the lease was
    -- granted. Each new owner raises the epoch.
    owner            text        NOT NULL DEFAULT '',
    epoch            bigint      NOT NULL DEFAULT 0,
    lease_expires_at timestamptz NOT NULL DEFAULT '-infinity',
    lease            interval    NOT NULL DEFAULT '0',
    -- Counts the moves, so that an owner notices when the row is not as it left it: a failover lost some moves.
    moves            bigint      NOT NULL DEFAULT 0,
    moved_at         timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Reports whether a row of the cursor's shard is delivered.
CREATE FUNCTION outbox_delivered(at outbox_cursor, xid xid8, id bigint) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN at.drained OR pg_visible_in_snapshot(xid, at.delivered)
        OR (at.batch IS NOT NULL AND id <= at.last_id AND pg_visible_in_snapshot(xid, at.batch));

-- The first cursor precedes every transaction, so every row ever written is new to it.
INSERT INTO outbox_cursor (shard, system_identifier, delivered)
SELECT 0, system_identifier, '1:1:' FROM pg_control_system();

-- The live relays. From these rows, each relay works out its fair share of the shards.
CREATE TABLE outbox_relay (
    owner      text        NOT NULL CONSTRAINT outbox_relay_pkey PRIMARY KEY,
    expires_at timestamptz NOT NULL,
    lease      interval    NOT NULL,
    -- Why the relay cannot publish, for operators; '' if it can.
    problem    text        NOT NULL DEFAULT ''
);

-- Spreads new messages over the given number of shards. Messages inserted before this commits are in shards of the old
-- generation, messages inserted after it in shards of the new one. Relays read the new shards only after the old ones
-- are drained, so no message of a key overtakes another.
--
-- The lock waits for every transaction that has inserted messages, and blocks new ones meanwhile: set a lock_timeout,
-- and try again. A shard's number is reused only after 32,000 others; by then the log contains no row of that shard.
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
    SELECT (max(shard) + 1) % 32000 INTO first
    FROM outbox_cursor WHERE generation = (SELECT max(generation) FROM outbox_cursor);
    DELETE FROM outbox_cursor WHERE drained AND shard BETWEEN first AND first + shards - 1;
    UPDATE outbox_cursor SET retired = true WHERE NOT retired;
    INSERT INTO outbox_cursor (shard, generation, system_identifier, delivered)
    SELECT first + n, (SELECT max(generation) + 1 FROM outbox_cursor), system_identifier, pg_current_snapshot()
    FROM generate_series(0, shards - 1) AS n, pg_control_system();
    PERFORM outbox_spread(first, shards);
END
$$;
-- +goose StatementEnd

-- Replaces outbox_shard by a function that spreads messages over the given number of shards, numbered from first.
-- +goose StatementBegin
CREATE FUNCTION outbox_spread(first integer, shards integer) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE OR REPLACE FUNCTION outbox_shard(key text, message_id uuid) RETURNS smallint '
        'LANGUAGE sql IMMUTABLE PARALLEL SAFE '
        'RETURN (%s + (hashtext(CASE key WHEN '''' THEN message_id::text ELSE key END) & 2147483647) %% %s)::smallint',
        first, shards);
END
$$;
-- +goose StatementEnd

-- Returns the shards that receive new messages and that no relay will read. The function outbox_shard is part of the
-- schema, and the cursors are rows, so a database may be moved with one and without the other. A hundred sample keys
-- show that: if the function is of another generation, it puts all of them into wrong shards.
-- +goose StatementBegin
CREATE FUNCTION outbox_stray_shards() RETURNS SETOF smallint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
BEGIN ATOMIC
    SELECT DISTINCT shard FROM generate_series(1, 100) AS n, outbox_shard(n::text, gen_random_uuid()) AS shard
    WHERE shard NOT IN (SELECT outbox_cursor.shard FROM outbox_cursor WHERE NOT retired);
END;
-- +goose StatementEnd

-- Reports whether every row in a slot is delivered. Rows below the xmin of their shard's cursor are delivered, so the
-- function reads only the others: almost none, unless a transaction has been open for very long.
-- +goose StatementBegin
CREATE FUNCTION outbox_slot_delivered(part text) RETURNS boolean
    LANGUAGE plpgsql AS $$
DECLARE
    waiting boolean;
BEGIN
    EXECUTE format('SELECT EXISTS (SELECT FROM outbox_cursor AS at JOIN %I AS message USING (shard)
        WHERE NOT drained AND xid >= pg_snapshot_xmin(delivered) AND NOT pg_visible_in_snapshot(xid, delivered))', part)
    INTO waiting;
    RETURN NOT waiting;
END
$$;
-- +goose StatementEnd

-- Truncates the slots that are delivered and past the retention, and returns their numbers. Every relay calls it about
-- once a minute.
--
-- The retention of a slot begins when its eight hours are over, so its last row is kept for the whole retention as
-- well. The sweep first checks without a lock that the slot is delivered, because that may take long. It checks again
-- under the lock, which waits for transactions that wrote to the slot and are still open. The lock request times out
-- soon, because all other sessions would queue behind it.
--
-- A clock that was set back makes a slot look older than its rows, so the sweep checks the rows as well. A clock that
-- was set forward, or that is behind the rows by more than the length of the ring, shortens the time for which
-- delivered rows can be replayed. No clock makes the sweep remove undelivered rows.
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
        BEGIN -- contains every statement that may meet the lock of another sweep
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
            NULL; -- the next sweep tries again
        END;
    END LOOP;
    RETURN emptied;
END
$$;
-- +goose StatementEnd

-- The backlog: the undelivered messages of each shard, as they were last counted.
CREATE TABLE outbox_backlog (
    shard       smallint    NOT NULL CONSTRAINT outbox_backlog_pkey PRIMARY KEY,
    messages    bigint      NOT NULL,
    -- When the first of them was inserted; NULL if there is none.
    oldest_at   timestamptz,
    measured_at timestamptz NOT NULL
);

-- Returns the backlog. It counts again unless the last count is younger than stale or another session is counting right
-- now. The relay calls it about every second, which keeps the numbers fresh for all other callers. Counting reads the
-- index entries of undelivered rows.
-- +goose StatementBegin
CREATE FUNCTION outbox_measure(stale interval) RETURNS SETOF outbox_backlog
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
    -- The session caches the plan, and a plan that was made for an empty log would scan a full one from then on. With
    -- sequential scans disabled, the scans that remain look so expensive that Postgres would JIT-compile every call.
    SET enable_seqscan = off SET jit = off AS $$
DECLARE
    cursor   record;
    waiting  bigint;
    first_id bigint;
BEGIN
    PERFORM needs_read_committed();
    -- 1869968483 is the lock class after that of the key locks.
    IF NOT EXISTS (SELECT FROM outbox_backlog WHERE clock_within(measured_at, stale))
            AND pg_try_advisory_xact_lock(1869968483, 0) THEN
        FOR cursor IN SELECT shard, delivered, batch, last_id FROM outbox_cursor WHERE NOT drained LOOP
            SELECT count(*), min(id) INTO waiting, first_id
            FROM (
                SELECT id, xid FROM outbox
                WHERE shard = cursor.shard AND xid = ANY (ARRAY(SELECT pg_snapshot_xip(cursor.delivered)))
                UNION ALL
                SELECT id, xid FROM outbox
                WHERE shard = cursor.shard AND xid >= pg_snapshot_xmax(cursor.delivered)) AS undelivered
            WHERE cursor.batch IS NULL OR id > cursor.last_id OR NOT pg_visible_in_snapshot(xid, cursor.batch);

            INSERT INTO outbox_backlog (shard, messages, oldest_at, measured_at)
            VALUES (cursor.shard, waiting,
                (SELECT created_at FROM outbox WHERE shard = cursor.shard AND id = first_id), clock_timestamp())
            ON CONFLICT (shard) DO UPDATE
            SET messages = excluded.messages, oldest_at = excluded.oldest_at, measured_at = excluded.measured_at;
        END LOOP;
    END IF;
    RETURN QUERY
        SELECT b.* FROM outbox_backlog AS b JOIN outbox_cursor AS c USING (shard) WHERE NOT c.drained ORDER BY b.shard;
END
$$;
-- +goose StatementEnd

-- Messages to insert into the log later, at due_at. If latest is set, only the latest message of a type and key is
-- wanted, and due_at ends the time in which newer ones may replace it. The same messages are accepted as in the log.
CREATE TABLE outbox_scheduled (LIKE outbox INCLUDING DEFAULTS);
ALTER TABLE outbox_scheduled
    DROP COLUMN slot, DROP COLUMN xid, DROP COLUMN id, DROP COLUMN shard,
    ADD COLUMN due_at timestamptz NOT NULL,
    ADD COLUMN latest boolean NOT NULL,
    ADD CONSTRAINT outbox_scheduled_pkey PRIMARY KEY (message_id),
    ADD CONSTRAINT outbox_scheduled_latest_has_key CHECK (NOT latest OR key <> '');
CREATE INDEX outbox_scheduled_due_idx ON outbox_scheduled (due_at, message_id);
CREATE UNIQUE INDEX outbox_scheduled_latest_idx ON outbox_scheduled (type, key) WHERE latest;

-- Schedules messages. With latest, a message replaces the one that waits for the same type and key but keeps that one's
-- due time, so no stream of updates can postpone it indefinitely. The row stays locked until the transaction ends, so
-- the transaction that commits last wins.
-- +goose StatementBegin
CREATE FUNCTION outbox_schedule(
    ids uuid[], types text[], keys text[], payloads bytea[], headers jsonb[], due_at timestamptz, latest boolean)
    RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO outbox_scheduled (message_id, type, key, payload, headers, due_at, latest)
    SELECT id, type, coalesce(key, ''), payload, coalesce(header, '{}'), outbox_schedule.due_at, outbox_schedule.latest
    FROM (
        SELECT DISTINCT ON (
            CASE WHEN outbox_schedule.latest THEN type END,
            CASE WHEN outbox_schedule.latest THEN key ELSE id::text END) *
        FROM unnest(ids, types, keys, payloads, headers)
            WITH ORDINALITY AS message (id, type, key, payload, header, position)
        WHERE outbox_accepts(id, type, key, payload, header) OR outbox_refuse(id, type, key, payload, header)
        -- Sorted, so that two calls cannot deadlock; of several messages with one type and key, the last one counts.
        ORDER BY
            CASE WHEN outbox_schedule.latest THEN type END,
            CASE WHEN outbox_schedule.latest THEN key ELSE id::text END,
            position DESC) AS message
    ON CONFLICT (type, key) WHERE latest DO UPDATE
    SET message_id = excluded.message_id, payload = excluded.payload, headers = excluded.headers,
        created_at = excluded.created_at;
END
$$;
-- +goose StatementEnd

-- Cancels a scheduled message, and returns whether it was still waiting.
-- +goose StatementBegin
CREATE FUNCTION outbox_unschedule(id uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    DELETE FROM outbox_scheduled WHERE message_id = id;
    RETURN FOUND;
END
$$;
-- +goose StatementEnd

-- Moves due messages into the log, in the order of their due times. Returns how many it moved, and when the next one is
-- due. Only one caller moves messages at a time; otherwise messages of a key could change places. The IDs get the
-- current time, because an inbox decides by the time in an ID how long to keep its record.
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
            SELECT count(*) AS n, array_agg(outbox_redate(message_id) ORDER BY due_at, message_id) AS ids,
                array_agg(type ORDER BY due_at, message_id) AS types,
                array_agg(key ORDER BY due_at, message_id) AS keys,
                array_agg(payload ORDER BY due_at, message_id) AS payloads,
                array_agg(headers ORDER BY due_at, message_id) AS headers
            FROM due
        )
        SELECT n INTO moved
        FROM ordered, LATERAL (SELECT outbox_insert(ids, types, keys, payloads, headers)) AS inserted WHERE n > 0;
        moved := coalesce(moved, 0);
    END IF;
    SELECT min(due_at) INTO next_due_at FROM outbox_scheduled;
END
$$;
-- +goose StatementEnd

-- Makes the log and its cursors valid again after the database was moved to another cluster, and returns how many
-- messages will be published. Messages that the cursors show as delivered stay delivered. All others are published,
-- possibly again, including those written since the move. Returns NULL if nothing is wrong.
--
-- The function first repairs what does not travel with the rows: sequences that stayed behind, and outbox_shard, which
-- spreads messages over the shards. Then it repairs the snapshots. They still tell which of the moved rows were
-- delivered, but not which of the rows written since. Those rows have ids above every delivered id or, if the sequence
-- began again, ids up to the last one drawn; and they are younger than the last move of the cursor. A row counts as
-- delivered only if all of these signs agree; otherwise it is published.
--
-- Delivered rows get xid 3, the first normal xid, which is lower than any in use. All other rows get the xid of this
-- transaction and a new id, in the order of their old ids or, if ids were drawn twice, in the order of time. Each
-- cursor gets a snapshot that sees every lower xid; the lock ensures that no other session is writing.
-- +goose StatementBegin
CREATE FUNCTION outbox_repair() RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    here    CONSTANT bigint := (SELECT system_identifier FROM pg_control_system());
    me      CONSTANT xid8 := pg_current_xact_id();
    behind  record;
    again   bigint; -- ids up to this one were drawn twice
    amiss   boolean := false;
    problem text;
    kept    bigint;
BEGIN
    PERFORM needs_read_committed();
    -- Lock the outbox last, because that blocks every writer.
    FOR behind IN SELECT * FROM sequences_behind() ORDER BY owner = 'outbox'::regclass LOOP
        EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', behind.owner);
        SELECT CASE col WHEN 'outbox.id' THEN drawn END INTO again FROM sequences_behind() WHERE seq = behind.seq;
        PERFORM setval(seq, used) FROM sequences_behind() WHERE seq = behind.seq;
        amiss := true;
    END LOOP;
    LOCK TABLE outbox IN SHARE ROW EXCLUSIVE MODE;
    PERFORM FROM outbox_cursor FOR UPDATE;
    SELECT CASE
        WHEN count(*) FILTER (WHERE NOT retired) = 0 THEN
            'outbox_cursor has no shard that accepts messages: copy its rows as well, and try again'
        WHEN max(moved_at) FILTER (WHERE system_identifier <> here) > clock_timestamp() THEN format(
            'the cursor was moved at %s, which is in the future by this cluster''s clock, so rows written since cannot '
            'be told from rows delivered before: set the clock, or try again after that time', max(moved_at))
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
                AND (system_identifier = here AND NOT drained
                    OR id <= top_id AND id > coalesce(again, 0) AND created_at <= moved_at)
        ) THEN '3' ELSE me END;
    WITH taken AS (
        DELETE FROM outbox WHERE xid = me RETURNING *
    )
    INSERT INTO outbox (slot, shard, message_id, type, key, payload, headers, created_at)
    SELECT slot,
        CASE WHEN shard IN (SELECT at.shard FROM outbox_cursor AS at WHERE NOT drained) THEN shard
            ELSE outbox_shard(key, message_id) END,
        message_id, type, key, payload, headers, created_at
    FROM taken ORDER BY CASE WHEN again IS NULL THEN id END, created_at, id;
    GET DIAGNOSTICS kept = ROW_COUNT;
    UPDATE outbox_cursor
    SET system_identifier = here, delivered = format('%s:%s:', me, me)::pg_snapshot, batch = NULL, last_id = 0,
        claimed = NULL, owner = '', epoch = epoch + 1, lease_expires_at = '-infinity', moves = moves + 1,
        moved_at = clock_timestamp();
    RETURN kept;
END
$$;
-- +goose StatementEnd

-- Messages that could not be published or applied, with everything needed to inspect and redrive them. A dead letter is
-- never deleted; only its resolution changes.
CREATE TABLE dead_letter (
    id         bigint      NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT dead_letter_pkey PRIMARY KEY,
    -- The consumer group; '' if the relay parked the message.
    consumer   text        NOT NULL,
    -- Text, because a broken message may contain anything here.
    message_id text        NOT NULL,
    type       text        NOT NULL,
    key        text        NOT NULL,
    payload    bytea       NOT NULL,
    headers    jsonb       NOT NULL,
    reason     text        NOT NULL,
    error      text        NOT NULL,
    attempts   integer     NOT NULL,
    dead_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- redriven: sent again. discarded: given up. duplicate: a copy of a message that is taken care of. NULL while open.
    resolution text        CONSTRAINT dead_letter_resolution_is_known
        CHECK (resolution IN ('redriven', 'discarded', 'duplicate')),
    resolved_at timestamptz,
    CONSTRAINT dead_letter_is_open_or_resolved CHECK ((resolution IS NULL) = (resolved_at IS NULL))
);
CREATE INDEX dead_letter_open_idx ON dead_letter (id) WHERE resolution IS NULL;
CREATE INDEX dead_letter_message_id_idx ON dead_letter (message_id);

-- A record of who resolved a dead letter, and why.
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

-- Keeps dead letters and audit records from being changed or deleted, even by mistake at the psql prompt. Only the
-- resolution of a dead letter may change.
-- +goose StatementBegin
CREATE FUNCTION dead_letter_guard() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE'
            AND to_jsonb(NEW) - '{resolution,resolved_at}'::text[] = to_jsonb(OLD) - '{resolution,resolved_at}'::text[]
    THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'dead letters cannot be changed or deleted: redrive or discard them'
        USING HINT = 'Use the commands "dead redrive" and "dead discard", which keep a record.';
END
$$;
-- +goose StatementEnd
CREATE TRIGGER dead_letter_guard_rows BEFORE UPDATE OR DELETE ON dead_letter
    FOR EACH ROW EXECUTE FUNCTION dead_letter_guard();
CREATE TRIGGER dead_letter_guard_table BEFORE TRUNCATE ON dead_letter
    FOR EACH STATEMENT EXECUTE FUNCTION dead_letter_guard();
CREATE TRIGGER dead_letter_audit_guard_rows BEFORE UPDATE OR DELETE ON dead_letter_audit
    FOR EACH ROW EXECUTE FUNCTION dead_letter_guard();
CREATE TRIGGER dead_letter_audit_guard_table BEFORE TRUNCATE ON dead_letter_audit
    FOR EACH STATEMENT EXECUTE FUNCTION dead_letter_guard();

-- Writers have access to the log only through a view and functions, which run with their owner's privileges. So no
-- writer can bypass the key locks or read messages of others.
REVOKE EXECUTE ON FUNCTION
    outbox_insert(uuid[], text[], text[], bytea[], jsonb[]), outbox_schedule, outbox_unschedule,
    outbox_measure, outbox_sweep, outbox_move_due, outbox_set_shards, outbox_repair, sequences_behind,
    outbox_stray_shards
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
GRANT SELECT ON outbox, outbox_cursor, outbox_relay, outbox_backlog, outbox_scheduled, dead_letter, dead_letter_audit
    TO shop_operator;
-- Every process compares the applied migrations with its own: those of the core, and those of the service.
GRANT SELECT ON goose_core_version, goose_db_version TO shop_api, shop_relay, shop_consumer, shop_operator;
GRANT UPDATE (resolution, resolved_at) ON dead_letter TO shop_operator;
GRANT INSERT ON dead_letter_audit TO shop_operator;

-- +goose Down
DROP FUNCTION outbox_repair, outbox_delivered, outbox_unschedule, outbox_move_due, outbox_schedule, outbox_measure,
    outbox_sweep, outbox_slot_delivered, outbox_set_shards, outbox_stray_shards, outbox_spread;
DROP VIEW outbox_message;
DROP TABLE dead_letter_audit, dead_letter, outbox_scheduled, outbox_backlog, outbox_relay, outbox_cursor, outbox;
DROP FUNCTION dead_letter_guard;
DROP FUNCTION outbox_insert(text, text, bytea, jsonb, uuid);
DROP FUNCTION outbox_insert(uuid[], text[], text[], bytea[], jsonb[]);
DROP FUNCTION outbox_accepts, outbox_refuse, outbox_headers_valid, outbox_timely, outbox_most_ahead, outbox_oldest,
    outbox_uuidv7, outbox_redate, outbox_shard, outbox_slot, outbox_slot_length, outbox_slots, sequences_behind,
    needs_read_committed, clock_age, clock_within, clock_holds;
