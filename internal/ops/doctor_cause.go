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

// cause is why a check could not run, and what to do about it.
type cause struct {
	// kind is the same for all checks that fail for the same reason.
	kind, cure string
	// blocksAll means that no check of the server can run.
	blocksAll bool
}

// findCause finds the cause of an error. setting names the server's URL, for the cure.
type findCause func(err error, setting string) cause

// otherServer is an error of a server other than the one that the check is about. setting names its URL.
type otherServer struct {
	setting string
	error
}

func (e otherServer) Unwrap() error { return e.error }

// noSchema is the cause of everything that is missing in a database without migrations.
const noSchema = "schema"

// databaseCause finds the cause of an error from Postgres or from the connection to it.
func databaseCause(err error, setting string) cause {
	var other otherServer
	if errors.As(err, &other) {
		why := databaseCause(other.error, other.setting)
		return cause{kind: other.setting + ": " + why.kind, cure: why.cure}
	}
	var refused *pgconn.PgError
	connecting := errors.As(err, new(*pgconn.ConnectError))
	if !errors.As(err, &refused) {
		return connectionCause(err, connecting, setting, "Postgres")
	}
	switch refused.Code {
	case "28P01", "28000":
		return cause{"login", "Check user and password in " + setting + ", and the server's pg_hba.conf.", true}
	case "3D000":
		return cause{"name", "Check the database's name in " + setting + ": the server has no database of that name.", true}
	case "42501":
		return rightsCause(connecting, setting)
	case "42P01", "42883", "42703", "42704", "3F000": // table, function, column, object, schema
		return cause{kind: noSchema, cure: "Run the command migrate on the database that " + setting + " should name, " +
			"and check that its search_path is unchanged."}
	case "53300":
		return cause{"connections", "All connections are in use: end some, or allow more (max_connections, " +
			"limits of role and database).", true}
	case "57P01", "57P02", "57P03":
		return cause{"starting", "The server is starting or stopping: wait for it, and read its log.", true}
	case "57014", "55P03":
		return slow()
	}
	if connecting {
		return cause{"refused", "The server, or a pooler in front of it, refuses the connection: check all of " +
			setting + ".", true}
	}
	return cause{kind: refused.Code, cure: "Look up the error code, and read the server's log."}
}

func rightsCause(connecting bool, setting string) cause {
	if connecting {
		return cause{"connect", "Grant CONNECT on the database to this role, or name another role in " +
			setting + ".", true}
	}
	return cause{kind: "rights", cure: "Connect as shop_operator or as the owner in " + setting + ". If you did, " +
		"run the command migrate as the owner."}
}

func slow() cause {
	return cause{kind: "slow", cure: "The check took too long: find out whether the server is overloaded, " +
		"and what it waits for (in Postgres: pg_stat_activity)."}
}

// brokerCause finds the cause of an error from RabbitMQ or from the connection to it.
func brokerCause(err error, setting string) cause {
	var other otherServer
	if errors.As(err, &other) {
		why := brokerCause(other.error, other.setting)
		return cause{kind: other.setting + ": " + why.kind, cure: why.cure}
	}
	var refused *amqp.Error
	connecting := errors.Is(err, rabbit.ErrNotConnected)
	if !errors.As(err, &refused) || !refused.Server && refused.Code != amqp.AccessRefused {
		return connectionCause(err, connecting, setting, "RabbitMQ")
	}
	switch {
	case refused.Code == amqp.AccessRefused && connecting:
		return cause{"login", "Check user and password in " + setting + "; the user guest may connect only from the " +
			"broker's own machine.", true}
	case refused.Code == amqp.NotAllowed && connecting:
		return cause{"vhost", "Check the vhost in " + setting + ": it does not exist, this user may not use it, " +
			"or it has too many connections.", true}
	case refused.Code == amqp.AccessRefused:
		return cause{kind: "rights", cure: "Name a user in " + setting + " that may configure the queues: " +
			"comparing a queue declares it (see the command topology)."}
	}
	return cause{kind: fmt.Sprint(refused.Code), cure: "Look up the error code, and read the broker's log."}
}

// connectionCause finds the cause of an error that no server sent.
func connectionCause(err error, connecting bool, setting, server string) cause {
	var network net.Error
	switch {
	case errors.As(err, new(*tls.CertificateVerificationError)), errors.As(err, new(tls.RecordHeaderError)):
		return cause{"tls", "Check TLS in " + setting + ": whether the server accepts it there, and which authorities " +
			"are trusted.", true}
	case errors.Is(err, context.DeadlineExceeded) && !connecting:
		return slow()
	case connecting, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, &network):
		cure := fmt.Sprintf("Check host and port in %s, and that %s is running and reachable from here.", setting, server)
		return cause{"connection", cure, true}
	}
	return cause{kind: err.Error(), cure: "Read the error; the doctor has no cure for it."}
}
