package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"example.com/shop/internal/app"
	"example.com/shop/internal/rabbit"
)

type topologyCommand struct {
	Exchange string  `env:"EXCHANGE" default:"events" help:"Topic exchange that events are published to."`
	Declare  bool    `help:"Declare exchange, queues and bindings, for processes that run with TOPOLOGY=given."`
	AMQPURL  amqpURL `name:"amqp-url" env:"AMQP_URL" help:"RabbitMQ and vhost, as a user who may configure them; needed to declare."`
	Users    string  `placeholder:"PREFIX" help:"Make a user of the broker for each process, called PREFIX-PROCESS, with the permissions that are printed and no others in the vhost, and no tags."`
	JSON     bool    `help:"Print JSON."`
	managementFlags
	UsersPassword string `name:"users-password" env:"AMQP_USERS_PASSWORD" help:"Password of the users that --users makes, any text."`
}

func (c *topologyCommand) Validate() error {
	if c.Declare && c.AMQPURL == "" {
		return errors.New("--amqp-url is needed to declare")
	}
	if c.Users != "" && (c.AMQPURL == "" || c.ManagementURL == "" || c.UsersPassword == "") {
		return errors.New("--users needs --amqp-url, --management-url and --users-password")
	}
	return (&brokerFlags{Exchange: c.Exchange}).check()
}

func (c *topologyCommand) Run(ctx context.Context) error {
	topology := app.Topology(c.Exchange)
	if c.Declare {
		if err := topology.Declare(ctx, string(c.AMQPURL)); err != nil {
			return err
		}
	}
	permissions := app.Permissions(c.Exchange)
	if c.Users != "" {
		if err := rabbit.MakeUsers(ctx, string(c.ManagementURL), string(c.AMQPURL), c.users(permissions)...); err != nil {
			return err
		}
	}
	if c.JSON {
		encoder := json.NewEncoder(os.Stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(map[string]any{"exchange": topology.Exchange, "queues": topology.Queues, "permissions": permissions})
	}
	fmt.Printf("exchange %s (topic)\n", topology.Exchange)
	for _, queue := range topology.Queues {
		fmt.Printf("queue    %s for %s; what the broker gives up goes to %s\n", queue.Name, strings.Join(queue.Types, ", "), rabbit.DeadQueue(queue.Name))
	}
	show := func(users ...string) {
		for _, user := range users {
			p := permissions[user]
			fmt.Printf("%-10s '%s' '%s' '%s'\n", user, p.Configure, p.Write, p.Read)
		}
	}
	fmt.Println("\nWith TOPOLOGY=given, all that the processes need (rabbitmqctl set_permissions USER CONFIGURE WRITE READ):")
	show("relay", "consumer", "console")
	fmt.Println("\nAn api with RPC_OVER_RABBITMQ, which makes its queues while it serves, and whoever calls it there:")
	show("rpc-server", "rpc-client")
	return nil
}

// users are one for each process. Users belong to the whole broker, which may have other services: hence the prefix.
func (c *topologyCommand) users(permissions map[string]rabbit.Permissions) (users []rabbit.User) {
	for _, process := range slices.Sorted(maps.Keys(permissions)) {
		name := c.Users + "-" + process
		users = append(users, rabbit.User{Name: name, Password: c.UsersPassword, Permissions: permissions[process]})
	}
	return users
}
