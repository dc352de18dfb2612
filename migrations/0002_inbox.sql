-- The inbox: which messages a consumer group has taken, and those whose handler is to be tried again.

-- +goose Up

-- One row for each message that a group has taken over from the broker: its effect is committed, or it stands in
-- inbox_retry or dead_letter. Eight slots of a day make a ring like the outbox's. The slot comes from the time inside the
-- UUIDv7, so all copies of a message meet in one slot and the primary key holds although the table is partitioned;
-- slot -1 holds messages of other senders whose IDs carry no time.
CREATE TABLE inbox (
    slot        smallint    NOT NULL,
    consumer    text        NOT NULL,
    message_id  uuid        NOT NULL,
    -- Deliveries that were seen: 1 and the duplicates that were absorbed.
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

-- Forgets messages that are older than the time to remember: empties the slots that hold nothing younger, and returns them. The time is in the IDs,
-- so a row that is inserted meanwhile does not change the answer unless it belongs here, and then the lock, which waits for
-- who has inserted, shows it. Messages without a time in their IDs are deleted, for some seconds at most.
-- +goose StatementBegin
CREATE FUNCTION inbox_sweep(remember interval) RETURNS smallint[]
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    oldest  CONSTANT timestamptz := clock_timestamp() - remember;
    first   CONSTANT uuid := (lpad(to_hex((extract(epoch FROM oldest) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid;
    part    text;
    kept    boolean;
    emptied smallint[] := '{}';
BEGIN
    PERFORM needs_read_committed();
    LOOP
        DELETE FROM inbox_slot_foreign WHERE ctid = ANY (ARRAY(SELECT ctid FROM inbox_slot_foreign WHERE received_at < oldest LIMIT 10000));
        EXIT WHEN NOT FOUND OR clock_timestamp() > oldest + remember + interval '10 s';
    END LOOP;
    FOR slot IN 0..7 LOOP
        part := 'inbox_slot_' || slot;
        BEGIN -- everything that may meet the lock of another sweep
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
            NULL; -- next time
        END;
    END LOOP;
    RETURN emptied;
END
$$;
-- +goose StatementEnd

CREATE TABLE inbox_retry (
    -- The order in which the messages of one key came. The head of a key is the first of them.
    seq        bigint      NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT inbox_retry_pkey PRIMARY KEY,
    consumer   text        NOT NULL,
    message_id text        NOT NULL,
    type       text        NOT NULL,
    key        text        NOT NULL,
    payload    bytea       NOT NULL,
    headers    jsonb       NOT NULL,
    -- Runs of the handler that failed.
    attempts   integer     NOT NULL,
    -- Runs that processes claimed since the last failure and told nothing of. A process that lives takes its own run
    -- back, so each one that stays took its process with it. The last one holds the claim.
    runs       uuid[]      NOT NULL DEFAULT '{}',
    -- NULL behind the head of its key.
    due_at     timestamptz CONSTRAINT inbox_retry_due_unless_behind CHECK (due_at IS NOT NULL OR key <> ''),
    last_error text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- "What comes next on this key?", and how many wait.
CREATE INDEX inbox_retry_key_idx ON inbox_retry (consumer, key, seq) WHERE key <> '';
-- "Does anything of these keys wait?", asked for every batch. A key has one head.
CREATE UNIQUE INDEX inbox_retry_head_idx ON inbox_retry (consumer, key) WHERE key <> '' AND due_at IS NOT NULL;
-- "What is due?"
CREATE INDEX inbox_retry_due_idx ON inbox_retry (consumer, due_at) WHERE due_at IS NOT NULL;
-- "Where is this message?" It waits once.
CREATE UNIQUE INDEX inbox_retry_message_id_idx ON inbox_retry (consumer, message_id) WHERE message_id <> '';

-- A key whose messages wait has a head, whoever inserts and deletes: else nothing would ever try them. Both triggers
-- take the lock of the key, until the end of their transaction, and look behind it in a statement of its own, which
-- sees what the holder before them committed.

-- A message joins its key at the end, or becomes its head. The place is taken behind the lock, so places are in the
-- order of commits. 1768841848 is 'inbx' in ASCII, a class of our own among advisory locks. Two keys with one hash
-- wait for each other in vain.
-- +goose StatementBegin
CREATE FUNCTION inbox_retry_join() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
    -- What the planner guesses of how many messages a key has may be wrong by any factor.
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

-- When a head is gone, the message behind it becomes the head, due at once. This runs at COMMIT: a retry deletes its
-- row before its handler runs, and nobody who joins the key shall wait for the handler.
-- +goose StatementBegin
CREATE FUNCTION inbox_retry_promote() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
    SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
BEGIN
    PERFORM needs_read_committed();
    PERFORM pg_advisory_xact_lock(1768841848, hashtext(OLD.consumer || ' ' || OLD.key));
    -- The next entry of inbox_retry_key_idx, and no other index has this order. In front of the old head lie the
    -- entries of all heads before, until they are vacuumed.
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

-- The groups that operators have paused: their consumers look here every second.
CREATE TABLE inbox_pause (
    consumer  text        NOT NULL CONSTRAINT inbox_pause_pkey PRIMARY KEY,
    actor     text        NOT NULL,
    reason    text        NOT NULL,
    paused_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The consumers at work, a row a process and group, each of them written about once a second: what a console shows as alive and as rates.
CREATE TABLE inbox_consumer (
    consumer   text             NOT NULL,
    owner      text             NOT NULL,
    -- Messages applied since the process began.
    applied    bigint           NOT NULL,
    -- How old the message was that was applied last, at that time; NULL before the first.
    lag        double precision,
    expires_at timestamptz      NOT NULL,
    lease      interval         NOT NULL,
    CONSTRAINT inbox_consumer_pkey PRIMARY KEY (consumer, owner)
);

-- Moves what waits of a key to the dead letters, the first message or all of them, and returns their IDs in their order. A message whose
-- handler runs at this moment is locked by it: then nothing is moved (lock_not_available), since it may just be succeeding.
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
    SELECT consumer, message_id, type, key, payload, headers, 'skipped', cause || '; last error: ' || last_error, attempts
    FROM inbox_retry WHERE seq = ANY (chosen) ORDER BY seq;
    DELETE FROM inbox_retry WHERE seq = ANY (chosen);
    RETURN moved;
END
$$;
-- +goose StatementEnd

-- What operators did, besides to dead letters, which have a log of their own.
CREATE TABLE operator_audit (
    id     bigint      NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT operator_audit_pkey PRIMARY KEY,
    action text        NOT NULL,
    -- What it was done to: a consumer group, a key of one, an operation.
    target text        NOT NULL,
    reason text        NOT NULL CONSTRAINT operator_audit_reason_is_given CHECK (reason <> ''),
    actor  text        NOT NULL CONSTRAINT operator_audit_actor_is_given CHECK (actor <> ''),
    detail text        NOT NULL DEFAULT '',
    at     timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TRIGGER operator_audit_guard_rows BEFORE UPDATE OR DELETE ON operator_audit FOR EACH ROW EXECUTE FUNCTION dead_letter_guard();
CREATE TRIGGER operator_audit_guard_table BEFORE TRUNCATE ON operator_audit FOR EACH STATEMENT EXECUTE FUNCTION dead_letter_guard();

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
