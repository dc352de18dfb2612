-- Idempotency keys: the stored responses for repeated calls.

-- +goose Up

-- One row per idempotency key, written in the transaction of the call's effect.
CREATE TABLE idempotency_key (
    caller       text        NOT NULL,
    key          text        NOT NULL,
    method       text        NOT NULL,
    request_hash bytea       NOT NULL,
    -- NULL only inside the transaction that executes the call.
    response     bytea,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT idempotency_key_pkey PRIMARY KEY (caller, key)
);

-- Serves the sweep.
CREATE INDEX idempotency_key_created_at_idx ON idempotency_key (created_at);

-- Deletes keys older than the retention, in batches of 5,000 and for about 10 s at most, and returns how many.
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
            SELECT ctid FROM idempotency_key WHERE created_at < began - retention ORDER BY created_at LIMIT 5000
            FOR UPDATE SKIP LOCKED));
        GET DIAGNOSTICS batch = ROW_COUNT;
        deleted := deleted + batch;
        EXIT WHEN batch < 5000 OR clock_timestamp() > began + interval '10 s';
    END LOOP;
    RETURN deleted;
END
$$;
-- +goose StatementEnd

REVOKE EXECUTE ON FUNCTION idempotency_key_sweep FROM PUBLIC;
GRANT EXECUTE ON FUNCTION idempotency_key_sweep TO shop_api;
GRANT SELECT, INSERT, UPDATE (response) ON idempotency_key TO shop_api;

-- +goose Down
DROP FUNCTION idempotency_key_sweep;
DROP TABLE idempotency_key;
