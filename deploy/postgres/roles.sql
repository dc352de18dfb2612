-- Run once, when the database is created, before any migration: the roles of migrations/0001_outbox.sql, with a
-- password that the processes know. The migration finds them and leaves them as they are. (shop_all is not here: it is
-- for `shop all`, and the migration creates it.)
\getenv password APP_PASSWORD
CREATE ROLE shop_api LOGIN PASSWORD :'password';
CREATE ROLE shop_relay LOGIN PASSWORD :'password';
CREATE ROLE shop_consumer LOGIN PASSWORD :'password';
CREATE ROLE shop_operator LOGIN PASSWORD :'password';
