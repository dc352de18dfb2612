-- Durable calls, and the answers that repeated calls get again.

-- +goose Up

-- One row a durable call. Rows are found by ID, by key, or by caller, and never by scanning for work: what waits for a worker is a message.
-- So old versions of rows, of which each call leaves two, cost room until the next vacuum and no time, and a DELETE past the
-- retention may add one more. Slots that are emptied as a whole, as the outbox has them, could not hold the unique key below.
CREATE TABLE operation (
    -- A UUIDv7, and the ID of the message that has a worker execute it.
    id              uuid        NOT NULL CONSTRAINT operation_pkey PRIMARY KEY,
    caller          text        NOT NULL,
    -- '' for none.
    idempotency_key text        NOT NULL,
    method          text        NOT NULL,
    -- The body stands here and not in the message: a worker reads this row anyway, a body may be larger than a message, and it is gone
    -- as soon as the call has ended, while messages are kept for replay. '' then.
    request         bytea       NOT NULL,
    request_hash    bytea       NOT NULL,
    -- Who the caller is, as internal/auth or another gives it, and the signature over this and the call.
    identity        bytea       NOT NULL,
    signature       bytea       NOT NULL,
    state           text        NOT NULL DEFAULT 'pending',
    attempts        integer     NOT NULL DEFAULT 0,
    -- A google.protobuf.Any, and an shop.operations.v1.Status; while the call runs, that of its last attempt.
    response        bytea,
    error           bytea,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at      timestamptz,
    ended_at        timestamptz,
    CONSTRAINT operation_state_known CHECK (state IN ('pending', 'running', 'succeeded', 'failed', 'cancelled')),
    CONSTRAINT operation_ended_iff_final CHECK ((ended_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))),
    CONSTRAINT operation_response_iff_succeeded CHECK ((response IS NOT NULL) = (state = 'succeeded')),
    CONSTRAINT operation_error_if_failed CHECK (error IS NOT NULL OR state NOT IN ('failed', 'cancelled'))
);

-- "Was this key used before?"
CREATE UNIQUE INDEX operation_key_idx ON operation (caller, idempotency_key) WHERE idempotency_key <> '';
-- ListOperations: pages of a caller's operations, the newest first.
CREATE INDEX operation_caller_idx ON operation (caller, id DESC);
-- The sweep.
CREATE INDEX operation_ended_at_idx ON operation (ended_at) WHERE ended_at IS NOT NULL;

-- One row a key, written in the transaction of its effect.
CREATE TABLE idempotency_key (
    caller       text        NOT NULL,
    key          text        NOT NULL,
    method       text        NOT NULL,
    request_hash bytea       NOT NULL,
    -- NULL only within the transaction that executes the call.
    response     bytea,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT idempotency_key_pkey PRIMARY KEY (caller, key)
);

-- The sweep.
CREATE INDEX idempotency_key_created_at_idx ON idempotency_key (created_at);

-- Forgets operations that ended longer ago than that, some thousands at a time and for some seconds at most, and returns how many. What has not
-- ended is kept, however old.
-- +goose StatementBegin
CREATE FUNCTION operation_sweep(retention interval) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    began   CONSTANT timestamptz := clock_timestamp();
    batch   bigint;
    deleted bigint := 0;
BEGIN
    PERFORM needs_read_committed();
    LOOP
        DELETE FROM operation WHERE id = ANY (ARRAY(
            SELECT id FROM operation WHERE ended_at < began - retention ORDER BY ended_at LIMIT 5000 FOR UPDATE SKIP LOCKED));
        GET DIAGNOSTICS batch = ROW_COUNT;
        deleted := deleted + batch;
        EXIT WHEN batch < 5000 OR clock_timestamp() > began + interval '10 s';
    END LOOP;
    RETURN deleted;
END
$$;
-- +goose StatementEnd

-- The same for keys.
-- +goose StatementBegin
CREATE FUNCTION idempotency_key_sweep(retention interval) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    began   CONSTANT timestamptz := clock_timestamp();
    batch   bigint;
    deleted bigint := 0;
BEGIN
    PERFORM needs_read_committed();
    LOOP
        DELETE FROM idempotency_key WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM idempotency_key WHERE created_at < began - retention ORDER BY created_at LIMIT 5000 FOR UPDATE SKIP LOCKED));
        GET DIAGNOSTICS batch = ROW_COUNT;
        deleted := deleted + batch;
        EXIT WHEN batch < 5000 OR clock_timestamp() > began + interval '10 s';
    END LOOP;
    RETURN deleted;
END
$$;
-- +goose StatementEnd

-- Calls off an operation that no worker has begun, and tells whether it could: operators may do this to anybody's, and nothing else.
-- +goose StatementBegin
CREATE FUNCTION operation_cancel(operation_id uuid, status bytea) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE operation SET state = 'cancelled', request = '', error = status, ended_at = clock_timestamp() WHERE id = operation_id AND state = 'pending';
    RETURN FOUND;
END
$$;
-- +goose StatementEnd

REVOKE EXECUTE ON FUNCTION operation_sweep, operation_cancel, idempotency_key_sweep FROM PUBLIC;
GRANT EXECUTE ON FUNCTION operation_cancel TO shop_operator;
GRANT EXECUTE ON FUNCTION operation_sweep TO shop_consumer;
GRANT EXECUTE ON FUNCTION idempotency_key_sweep TO shop_api;
-- Workers insert, too: a handler may stage another call.
GRANT SELECT, INSERT ON operation TO shop_api, shop_consumer;
GRANT UPDATE (state, request, error, ended_at) ON operation TO shop_api;
GRANT UPDATE (state, request, response, error, attempts, started_at, ended_at) ON operation TO shop_consumer;
GRANT SELECT ON operation TO shop_operator;
GRANT SELECT, INSERT, UPDATE (response) ON idempotency_key TO shop_api;

-- +goose Down
DROP FUNCTION idempotency_key_sweep, operation_cancel, operation_sweep;
DROP TABLE idempotency_key, operation;
