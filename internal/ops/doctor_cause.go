package ops

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"

	"example.com/shop/internal/rabbit"
	"github.com/jackc/pgx/v5/pgconn"
	amqp "github.com/rabbitmq/amqp091-go"
)

// cause is why a check could not be made, and what can be done about it.
type cause struct {
	// kind is the same for all checks that fail for one reason.
	kind, cure string
	// whole says that no check of the server can be made.
	whole bool
}

// judge finds the cause of an error. The setting is the one that names the server, for the cure.
type judge func(err error, setting string) cause

// elsewhere is an error of a server that another setting names than the one that the check is about.
type elsewhere struct {
	setting string
	error
}

func (e elsewhere) Unwrap() error { return e.error }

// noSchema is the cause of whatever is missing in a database that is not migrated.
const noSchema = "schema"

// databaseCause judges what Postgres, or the way to it, says.
func databaseCause(err error, setting string) cause {
	var other elsewhere
	if errors.As(err, &other) {
		why := databaseCause(other.error, other.setting)
		return cause{kind: other.setting + ": " + why.kind, cure: why.cure}
	}
	var refused *pgconn.PgError
	connecting := errors.As(err, new(*pgconn.ConnectError))
	if !errors.As(err, &refused) {
		return wayCause(err, connecting, setting, "Postgres")
	}
	switch refused.Code {
	case "28P01", "28000":
		return cause{"login", "Check user and password in " + setting + ", and the server's pg_hba.conf.", true}
	case "3D000":
		return cause{"name", "Check the database's name in " + setting + ": the server has no such database.", true}
	case "42501":
		return rightsCause(connecting, setting)
	case "42P01", "42883", "42703", "42704", "3F000": // table, function, column, object, schema
		return cause{kind: noSchema, cure: "Run the command migrate, on the database that " + setting +
			" should name; " +
			"see that its search_path is not changed."}
	case "53300":
		return cause{"connections",
			"All connections are taken: end some of them, or allow for more (max_connections, " +
				"limits of role and database).", true}
	case "57P01", "57P02", "57P03":
		return cause{"starting", "The server is starting or stopping: wait for it, and look at its log.", true}
	case "57014", "55P03":
		return slow()
	}
	if connecting {
		return cause{"refused", "The server, or a pooler before it, refuses the connection: check all of " +
			setting + ".", true}
	}
	return cause{kind: refused.Code, cure: "Look up the error, and see the server's log."}
}

func rightsCause(connecting bool, setting string) cause {
	if connecting {
		return cause{"connect", "Grant CONNECT on the database to this role, or name another role in " +
			setting + ".", true}
	}
	return cause{kind: "rights", cure: "Connect as shop_operator, or as the owner, in " + setting +
		". If that is the role, " +
		"run the command migrate as the owner."}
}

func slow() cause {
	return cause{kind: "slow", cure: "It took too long: see whether the server is overloaded, and what it waits for " +
		"(of Postgres: pg_stat_activity)."}
}

// brokerCause judges what RabbitMQ, or the way to it, says.
func brokerCause(err error, setting string) cause {
	var other elsewhere
	if errors.As(err, &other) {
		why := brokerCause(other.error, other.setting)
		return cause{kind: other.setting + ": " + why.kind, cure: why.cure}
	}
	var refused *amqp.Error
	connecting := errors.Is(err, rabbit.ErrNotConnected)
	if !errors.As(err, &refused) || !refused.Server && refused.Code != amqp.AccessRefused {
		return wayCause(err, connecting, setting, "RabbitMQ")
	}
	switch {
	case refused.Code == amqp.AccessRefused && connecting:
		return cause{"login", "Check user and password in " + setting +
			"; the user guest may connect from the broker's " +
			"own machine only.", true}
	case refused.Code == amqp.NotAllowed && connecting:
		return cause{"vhost", "Check the vhost in " + setting + ": it is not there, this user may not use it, " +
			"or there are too many connections.", true}
	case refused.Code == amqp.AccessRefused:
		return cause{kind: "rights", cure: "Name a user in " + setting + " that may configure the queues: " +
			"to compare one is to declare it (see the command topology)."}
	}
	return cause{kind: fmt.Sprint(refused.Code), cure: "Look up the error, and see the broker's log."}
}

// wayCause judges errors that no server has sent.
func wayCause(err error, connecting bool, setting, server string) cause {
	var network net.Error
	switch {
	case errors.As(err, new(*tls.CertificateVerificationError)), errors.As(err, new(tls.RecordHeaderError)):
		return cause{"tls", "Check TLS in " + setting +
			": whether the server speaks it there, and which authorities are trusted.", true}
	case errors.Is(err, context.DeadlineExceeded) && !connecting:
		return slow()
	case connecting, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, &network):
		cure := fmt.Sprintf("Check host and port in %s, and that %s is running and can be reached from here.", setting,
			server)
		return cause{"way", cure, true}
	}
	return cause{kind: err.Error(), cure: "Read the error; this is not one that the doctor knows."}
}
