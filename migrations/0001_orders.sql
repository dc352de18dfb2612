-- The example domain. The core names none of these tables: delete this file together with internal/orders.

-- +goose Up

CREATE TABLE orders (
    id            uuid        NOT NULL,
    customer_id   text        NOT NULL,
    status        text        NOT NULL DEFAULT 'placed',
    reject_reason text        NOT NULL DEFAULT '',
    placed_at     timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT orders_pk PRIMARY KEY (id),
    CONSTRAINT orders_status_known CHECK (status IN ('placed', 'confirmed', 'rejected', 'cancelled')),
    CONSTRAINT orders_reason_iff_rejected CHECK ((status = 'rejected') = (reject_reason <> ''))
);

-- Serves ListOrders: pages of all orders, newest first.
CREATE INDEX orders_by_time ON orders (placed_at DESC, id DESC);

-- Serves ListOrders for one customer.
CREATE INDEX orders_by_customer ON orders (customer_id, placed_at DESC, id DESC);

CREATE TABLE order_lines (
    order_id uuid    NOT NULL,
    sku      text    NOT NULL,
    quantity integer NOT NULL,
    CONSTRAINT order_lines_pk PRIMARY KEY (order_id, sku),
    CONSTRAINT order_lines_of_order FOREIGN KEY (order_id) REFERENCES orders (id) ON DELETE CASCADE,
    CONSTRAINT order_lines_quantity_positive CHECK (quantity > 0)
);

-- SetStock sets total. free is computed, so total = free + reserved always holds.
CREATE TABLE stock (
    sku      text    NOT NULL,
    total    integer NOT NULL,
    reserved integer NOT NULL DEFAULT 0,
    free     integer NOT NULL GENERATED ALWAYS AS (total - reserved) STORED,
    CONSTRAINT stock_pk PRIMARY KEY (sku),
    CONSTRAINT stock_reserved_not_negative CHECK (reserved >= 0),
    CONSTRAINT stock_free_not_negative CHECK (free >= 0)
);

-- Stock reserved by confirmed orders. The quantities of an SKU add up to stock.reserved.
CREATE TABLE reservations (
    order_id uuid    NOT NULL,
    sku      text    NOT NULL,
    quantity integer NOT NULL,
    CONSTRAINT reservations_pk PRIMARY KEY (order_id, sku),
    CONSTRAINT reservations_quantity_positive CHECK (quantity > 0)
);

-- (order_id, kind) is deliberately not unique. The inbox guarantees one notification per order and kind; a constraint
-- here would hide a violation from tests that count the rows.
CREATE TABLE notifications (
    id          bigint      GENERATED ALWAYS AS IDENTITY,
    order_id    uuid        NOT NULL,
    kind        text        NOT NULL,
    customer_id text        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT notifications_pk PRIMARY KEY (id),
    CONSTRAINT notifications_kind_known CHECK (kind IN ('confirmed', 'rejected'))
);

-- For support: finds the notifications of an order.
CREATE INDEX notifications_by_order ON notifications (order_id);

-- Consumers have all of the API's privileges, because they execute its durable calls.
GRANT SELECT, INSERT, UPDATE ON orders, stock TO shop_api, shop_consumer;
GRANT SELECT, INSERT ON order_lines TO shop_api, shop_consumer;
GRANT SELECT, INSERT, DELETE ON reservations TO shop_consumer;
GRANT INSERT ON notifications TO shop_consumer;

-- +goose Down

DROP TABLE notifications;
DROP TABLE reservations;
DROP TABLE stock;
DROP TABLE order_lines;
DROP TABLE orders;
