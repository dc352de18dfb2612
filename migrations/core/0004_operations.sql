-- Durable calls.

-- +goose Up

-- One row per durable call. Rows are found by ID, by key or by caller, and never by scanning for work, because messages
-- trigger the workers. So the two dead row versions of each call cost space until the next vacuum, but no time, and the
-- DELETE after the retention may add a third. Slots that are truncated as a whole, as in the outbox, could not enforce
-- the unique key below.
CREATE TABLE operation (
    -- A UUIDv7, and also the ID of the message that makes a worker execute the call.
    id              uuid        NOT NULL CONSTRAINT operation_pkey PRIMARY KEY,
    caller          text        NOT NULL,
    -- '' if the call has none.
    idempotency_key text        NOT NULL,
    method          text        NOT NULL,
    -- The request body is here and not in the message: a worker reads this row anyway, a body may be larger than a
    -- message, and the body is removed when the call ends, while messages are kept for replay. '' after the end.
    request         bytea       NOT NULL,
    request_hash    bytea       NOT NULL,
    -- The caller's identity, as internal/auth or another source provides it, and a signature over identity and call.
    identity        bytea       NOT NULL,
    signature       bytea       NOT NULL,
    state           text        NOT NULL DEFAULT 'pending',
    attempts        integer     NOT NULL DEFAULT 0,
    -- A google.protobuf.Any and a shop.operations.v1.Status. While the call runs, error is from its last attempt.
    response        bytea,
    error           bytea,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at      timestamptz,
    ended_at        timestamptz,
    CONSTRAINT operation_state_known CHECK (state IN ('pending', 'running', 'succeeded', 'failed', 'cancelled')),
    CONSTRAINT operation_ended_iff_final
        CHECK ((ended_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))),
    CONSTRAINT operation_response_iff_succeeded CHECK ((response IS NOT NULL) = (state = 'succeeded')),
    CONSTRAINT operation_error_if_failed CHECK (error IS NOT NULL OR state NOT IN ('failed', 'cancelled'))
);

-- Finds the call that used a key before.
CREATE UNIQUE INDEX operation_key_idx ON operation (caller, idempotency_key) WHERE idempotency_key <> '';
-- Serves ListOperations: pages of a caller's operations, newest first.
CREATE INDEX operation_caller_idx ON operation (caller, id DESC);
-- Serves the sweep.
CREATE INDEX operation_ended_at_idx ON operation (ended_at) WHERE ended_at IS NOT NULL;

-- Deletes operations that ended longer ago than the retention, in batches of 5,000 and for about 10 s at most, and
-- returns how many. Operations that have not ended are kept, however old they are.
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
            SELECT id FROM operation WHERE ended_at < began - retention ORDER BY ended_at LIMIT 5000
            FOR UPDATE SKIP LOCKED));
        GET DIAGNOSTICS batch = ROW_COUNT;
        deleted := deleted + batch;
        EXIT WHEN batch < 5000 OR clock_timestamp() > began + interval '10 s';
    END LOOP;
    RETURN deleted;
END
$$;
-- +goose StatementEnd

-- Cancels an operation that no worker has started, and returns whether it did. Operators may cancel any caller's
-- operation, and cannot change operations in any other way.
-- +goose StatementBegin
CREATE FUNCTION operation_cancel(operation_id uuid, status bytea) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE operation SET state = 'cancelled', request = '', error = status, ended_at = clock_timestamp()
    WHERE id = operation_id AND state = 'pending';
    RETURN FOUND;
END
$$;
-- +goose StatementEnd

REVOKE EXECUTE ON FUNCTION operation_sweep, operation_cancel FROM PUBLIC;
GRANT EXECUTE ON FUNCTION operation_cancel TO shop_operator;
GRANT EXECUTE ON FUNCTION operation_sweep TO shop_consumer;
-- Workers insert as well, because a handler may stage another call.
GRANT SELECT, INSERT ON operation TO shop_api, shop_consumer;
GRANT UPDATE (state, request, error, ended_at) ON operation TO shop_api;
GRANT UPDATE (state, request, response, error, attempts, started_at, ended_at) ON operation TO shop_consumer;
GRANT SELECT ON operation TO shop_operator;

-- +goose Down
DROP FUNCTION operation_cancel, operation_sweep;
DROP TABLE operation;
