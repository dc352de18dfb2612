-- The inbox: the messages that each consumer group has taken, and the messages that wait for another run of their
-- handler.

-- +goose Up

-- One row per message that a consumer group has taken from the broker: its effect is committed, or the message is in
-- inbox_retry or dead_letter. The table is a ring of eight slots of one day each, similar to the outbox. The slot
-- follows from the time in the UUIDv7, so all copies of a message meet in one slot, and the primary key recognizes them
-- although the table is partitioned. Slot -1 is for messages of other senders, whose IDs contain no time.
CREATE TABLE inbox (
    slot        smallint    NOT NULL,
    consumer    text        NOT NULL,
    message_id  uuid        NOT NULL,
    -- Deliveries so far: the first one, and the duplicates that were absorbed.
    copies      integer     NOT NULL DEFAULT 1,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT inbox_pkey PRIMARY KEY (slot, consumer, message_id)
) PARTITION BY LIST (slot);

CREATE TABLE inbox_slot_foreign PARTITION OF inbox FOR VALUES IN (-1);

-- +goose StatementBegin
DO $$
BEGIN
    FOR slot IN 0..7 LOOP
        EXECUTE format('CREATE TABLE inbox_slot_%s PARTITION OF inbox FOR VALUES IN (%s)', slot, slot);
    END LOOP;
END
$$;
-- +goose StatementEnd

CREATE INDEX inbox_slot_foreign_received_at_idx ON inbox_slot_foreign USING brin (received_at);

-- Forgets messages that are older than remember: truncates the slots that contain no younger message, and returns their
-- numbers. The age of a message follows from its ID, so the first check can be wrong only because of a young row that
-- is inserted concurrently. The lock waits for such inserts, and the second check sees them. Messages whose IDs contain
-- no time are deleted in batches, for about 10 s at most.
-- +goose StatementBegin
CREATE FUNCTION inbox_sweep(remember interval) RETURNS smallint[]
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    oldest  CONSTANT timestamptz := clock_timestamp() - remember;
    first   CONSTANT uuid :=
        (lpad(to_hex((extract(epoch FROM oldest) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid;
    part    text;
    kept    boolean;
    emptied smallint[] := '{}';
BEGIN
    PERFORM needs_read_committed();
    LOOP
        DELETE FROM inbox_slot_foreign
        WHERE ctid = ANY (ARRAY(SELECT ctid FROM inbox_slot_foreign WHERE received_at < oldest LIMIT 10000));
        EXIT WHEN NOT FOUND OR clock_timestamp() > oldest + remember + interval '10 s';
    END LOOP;
    FOR slot IN 0..7 LOOP
        part := 'inbox_slot_' || slot;
        BEGIN -- contains every statement that may meet the lock of another sweep
            CONTINUE WHEN pg_relation_size(part::regclass) = 0;
            EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE message_id >= $1)', part) INTO kept USING first;
            CONTINUE WHEN kept;
            EXECUTE format('LOCK TABLE ONLY %I IN ACCESS EXCLUSIVE MODE', part);
            EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE message_id >= $1)', part) INTO kept USING first;
            IF NOT kept THEN
                EXECUTE format('TRUNCATE ONLY %I', part);
                emptied := emptied || slot::smallint;
            END IF;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            NULL; -- the next sweep tries again
        END;
    END LOOP;
    RETURN emptied;
END
$$;
-- +goose StatementEnd

-- Messages that wait for a retry, and the messages of the same keys behind them.
CREATE TABLE inbox_retry (
    -- The order in which the messages of a key arrived. The first waiting message of a key is its head.
    seq        bigint      NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT inbox_retry_pkey PRIMARY KEY,
    consumer   text        NOT NULL,
    message_id text        NOT NULL,
    type       text        NOT NULL,
    key        text        NOT NULL,
    payload    bytea       NOT NULL,
    headers    jsonb       NOT NULL,
    -- Failed runs of the handler.
    attempts   integer     NOT NULL,
    -- Runs that processes claimed since the last failure and whose outcome is unknown. A process that survives an
    -- interrupted run removes it, so each run that remains ended together with its process. The last run owns the
    -- claim.
    runs       uuid[]      NOT NULL DEFAULT '{}',
    -- NULL for a message behind the head of its key.
    due_at     timestamptz CONSTRAINT inbox_retry_due_unless_behind CHECK (due_at IS NOT NULL OR key <> ''),
    last_error text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Finds the next message of a key, and counts how many wait.
CREATE INDEX inbox_retry_key_idx ON inbox_retry (consumer, key, seq) WHERE key <> '';
-- Finds, for every batch, the keys that have waiting messages. A key has one head.
CREATE UNIQUE INDEX inbox_retry_head_idx ON inbox_retry (consumer, key) WHERE key <> '' AND due_at IS NOT NULL;
-- Finds due messages.
CREATE INDEX inbox_retry_due_idx ON inbox_retry (consumer, due_at) WHERE due_at IS NOT NULL;
-- Finds a message by its ID. A message waits only once.
CREATE UNIQUE INDEX inbox_retry_message_id_idx ON inbox_retry (consumer, message_id) WHERE message_id <> '';

-- Two triggers ensure that a key with waiting messages always has a head, whichever transactions insert and delete;
-- without a head, no process would ever retry them. Both triggers lock the key until their transaction ends, and then
-- look in a separate statement, which sees what the previous owner of the lock committed.

-- A message joins the end of its key, or becomes its head. It draws its seq under the lock, so seqs are in the order of
-- commits. 1768841848 is 'inbx' in ASCII, a class of advisory locks that only this schema uses. Two keys with the same
-- hash merely wait for each other.
-- +goose StatementBegin
CREATE FUNCTION inbox_retry_join() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
    -- The planner's estimate of how many messages a key has may be wrong by any factor.
    SET enable_seqscan = off SET enable_bitmapscan = off AS $$
BEGIN
    PERFORM needs_read_committed();
    PERFORM pg_advisory_xact_lock(1768841848, hashtext(NEW.consumer || ' ' || NEW.key));
    NEW.seq := nextval('inbox_retry_seq_seq');
    NEW.due_at := CASE WHEN NOT EXISTS (
        SELECT FROM inbox_retry WHERE consumer = NEW.consumer AND key = NEW.key AND key <> '')
        THEN coalesce(NEW.due_at, clock_timestamp()) END;
    RETURN NEW;
END
$$;
-- +goose StatementEnd
CREATE TRIGGER inbox_retry_join BEFORE INSERT ON inbox_retry
    FOR EACH ROW WHEN (NEW.key <> '') EXECUTE FUNCTION inbox_retry_join();

-- When a head is deleted, the message behind it becomes the head, and is due at once. The trigger runs at COMMIT: a
-- retry deletes its row before its handler runs, and messages that join the key must not wait for the handler.
-- +goose StatementBegin
CREATE FUNCTION inbox_retry_promote() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
    SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
BEGIN
    PERFORM needs_read_committed();
    PERFORM pg_advisory_xact_lock(1768841848, hashtext(OLD.consumer || ' ' || OLD.key));
    -- Reads the next entry of inbox_retry_key_idx; no other index has this order. The search begins at the old head,
    -- because the index contains the entries of all earlier heads until they are vacuumed.
    UPDATE inbox_retry AS head SET due_at = clock_timestamp()
    FROM (
        SELECT seq, consumer, key FROM inbox_retry
        WHERE key <> '' AND (consumer, key, seq) > (OLD.consumer, OLD.key, OLD.seq)
        ORDER BY consumer, key, seq LIMIT 1) AS next
    WHERE head.seq = next.seq AND next.consumer = OLD.consumer AND next.key = OLD.key AND head.due_at IS NULL;
    RETURN NULL;
END
$$;
-- +goose StatementEnd
CREATE CONSTRAINT TRIGGER inbox_retry_promote AFTER DELETE ON inbox_retry DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.key <> '' AND OLD.due_at IS NOT NULL) EXECUTE FUNCTION inbox_retry_promote();

-- Consumer groups that operators have paused. Every consumer checks this table once a second.
CREATE TABLE inbox_pause (
    consumer  text        NOT NULL CONSTRAINT inbox_pause_pkey PRIMARY KEY,
    actor     text        NOT NULL,
    reason    text        NOT NULL,
    paused_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Live consumers: one row per process and consumer group, written about once a second. It tells
-- operators which processes are alive, and their rates.
CREATE TABLE inbox_consumer (
    consumer   text             NOT NULL,
    owner      text             NOT NULL,
    -- Messages applied since the process started.
    applied    bigint           NOT NULL,
    -- The age in seconds of the last applied message at the time it was applied; NULL before the first.
    lag        double precision,
    expires_at timestamptz      NOT NULL,
    lease      interval         NOT NULL,
    CONSTRAINT inbox_consumer_pkey PRIMARY KEY (consumer, owner)
);

-- Moves the waiting messages of a key to dead_letter, either the first one or all of them, and returns their IDs in
-- order. A running handler keeps its message locked: then the function moves nothing and raises lock_not_available,
-- because the handler may be about to succeed.
-- +goose StatementBegin
CREATE FUNCTION inbox_bury(of_consumer text, of_key text, whole boolean, cause text) RETURNS text[]
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET enable_seqscan = off AS $$
DECLARE
    chosen bigint[] := ARRAY(
        SELECT seq FROM inbox_retry WHERE consumer = of_consumer AND key = of_key AND key <> '' AND due_at IS NOT NULL
        FOR UPDATE NOWAIT);
    moved  text[];
BEGIN
    PERFORM needs_read_committed();
    IF whole THEN
        chosen := ARRAY(
            SELECT seq FROM inbox_retry WHERE consumer = of_consumer AND key = of_key AND key <> '' FOR UPDATE NOWAIT);
    END IF;
    moved := ARRAY(SELECT message_id FROM inbox_retry WHERE seq = ANY (chosen) ORDER BY seq);
    INSERT INTO dead_letter (consumer, message_id, type, key, payload, headers, reason, error, attempts)
    SELECT consumer, message_id, type, key, payload, headers, 'skipped', cause || '; last error: ' || last_error,
        attempts
    FROM inbox_retry WHERE seq = ANY (chosen) ORDER BY seq;
    DELETE FROM inbox_retry WHERE seq = ANY (chosen);
    RETURN moved;
END
$$;
-- +goose StatementEnd

-- A record of operators' actions. Actions on dead letters are in dead_letter_audit.
CREATE TABLE operator_audit (
    id     bigint      NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT operator_audit_pkey PRIMARY KEY,
    action text        NOT NULL,
    -- The object of the action: a consumer group, a key of a consumer group, an operation.
    target text        NOT NULL,
    reason text        NOT NULL CONSTRAINT operator_audit_reason_is_given CHECK (reason <> ''),
    actor  text        NOT NULL CONSTRAINT operator_audit_actor_is_given CHECK (actor <> ''),
    detail text        NOT NULL DEFAULT '',
    at     timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TRIGGER operator_audit_guard_rows BEFORE UPDATE OR DELETE ON operator_audit
    FOR EACH ROW EXECUTE FUNCTION dead_letter_guard();
CREATE TRIGGER operator_audit_guard_table BEFORE TRUNCATE ON operator_audit
    FOR EACH STATEMENT EXECUTE FUNCTION dead_letter_guard();

REVOKE EXECUTE ON FUNCTION inbox_sweep, inbox_bury, inbox_retry_join, inbox_retry_promote FROM PUBLIC;
GRANT EXECUTE ON FUNCTION inbox_sweep TO shop_consumer;
GRANT EXECUTE ON FUNCTION inbox_bury TO shop_operator;
GRANT SELECT, INSERT, UPDATE ON inbox TO shop_consumer;
GRANT SELECT, INSERT, UPDATE, DELETE ON inbox_retry, inbox_consumer TO shop_consumer;
GRANT SELECT ON inbox_pause TO shop_consumer;
GRANT SELECT, INSERT ON inbox, inbox_retry, operator_audit TO shop_operator;
GRANT SELECT ON inbox_consumer TO shop_operator;
GRANT SELECT, INSERT, DELETE ON inbox_pause TO shop_operator;

-- +goose Down
DROP TABLE operator_audit, inbox_consumer, inbox_pause, inbox_retry, inbox;
DROP FUNCTION inbox_bury, inbox_sweep, inbox_retry_join, inbox_retry_promote;
