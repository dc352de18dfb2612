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
	Exchange string  `env:"EXCHANGE" default:"events" help:"Topic exchange for events."`
	Declare  bool    `help:"Declare exchange, queues and bindings, for processes that run with TOPOLOGY=given."`
	AMQPURL  amqpURL `name:"amqp-url" env:"AMQP_URL" help:"${topology_amqp_url}"`
	Users    string  `placeholder:"PREFIX" help:"${users}"`
	JSON     bool    `help:"Print JSON."`
	managementFlags
	UsersPassword string `name:"users-password" env:"AMQP_USERS_PASSWORD" help:"${users_password}"`
}

func (c *topologyCommand) Validate() error {
	if c.Declare && c.AMQPURL == "" {
		return errors.New("--declare needs --amqp-url")
	}
	if c.Users != "" && (c.AMQPURL == "" || c.ManagementURL == "" || c.UsersPassword == "") {
		return errors.New("--users needs --amqp-url, --management-url and --users-password")
	}
	return (&brokerFlags{Exchange: c.Exchange}).check()
}

func (c *topologyCommand) Run(ctx context.Context) error {
	topology, err := app.Topology(c.Exchange)
	if err != nil {
		return err
	}
	if c.Declare {
		if err := topology.Declare(ctx, string(c.AMQPURL)); err != nil {
			return err
		}
	}
	permissions, err := app.Permissions(c.Exchange)
	if err != nil {
		return err
	}
	if c.Users != "" {
		users := c.users(permissions)
		if err := rabbit.MakeUsers(ctx, string(c.ManagementURL), string(c.AMQPURL), users...); err != nil {
			return err
		}
	}
	if c.JSON {
		encoder := json.NewEncoder(os.Stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(map[string]any{
			"exchange": topology.Exchange, "queues": topology.Queues, "permissions": permissions,
		})
	}
	fmt.Printf("exchange %s (topic)\n", topology.Exchange)
	for _, queue := range topology.Queues {
		types, dead := strings.Join(queue.Types, ", "), rabbit.DeadQueue(queue.Name)
		fmt.Printf("queue    %s for %s; undeliverable messages go to %s\n", queue.Name, types, dead)
	}
	fmt.Println("\nMinimal permissions of the broker's users (rabbitmqctl set_permissions USER CONFIGURE WRITE READ),\n" +
		"of relay and consumer with TOPOLOGY=given:")
	for _, user := range slices.Sorted(maps.Keys(permissions)) {
		p := permissions[user]
		fmt.Printf("%-10s '%s' '%s' '%s'\n", user, p.Configure, p.Write, p.Read)
	}
	if topics := permissions["relay"].Topics; topics != nil { // nil for a service that publishes nothing
		fmt.Println("\nTypes that the relay may publish (rabbitmqctl set_topic_permissions USER EXCHANGE WRITE READ):")
		fmt.Printf("%-10s '%s' '%s' '%s'\n", "relay", topics.Exchange, topics.Write, topics.Read)
	}
	return nil
}

// users returns a user for each process. Users belong to the whole broker, which other services may share: hence the
// prefix.
func (c *topologyCommand) users(permissions map[string]rabbit.Permissions) (users []rabbit.User) {
	for _, process := range slices.Sorted(maps.Keys(permissions)) {
		name := c.Users + "-" + process
		users = append(users, rabbit.User{Name: name, Password: c.UsersPassword, Permissions: permissions[process]})
	}
	return users
}
