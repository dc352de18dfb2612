-- Runs once, when the database is created and before any migration. It creates the roles of
-- migrations/core/0001_outbox.sql with a password that the processes know; the migration leaves existing roles as they
-- are. The migration creates shop_all, the role of `shop all`, itself.
\getenv password APP_PASSWORD
CREATE ROLE shop_api LOGIN PASSWORD :'password';
CREATE ROLE shop_relay LOGIN PASSWORD :'password';
CREATE ROLE shop_consumer LOGIN PASSWORD :'password';
CREATE ROLE shop_operator LOGIN PASSWORD :'password';
