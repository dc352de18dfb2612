package main

import (
	"example.com/shop/internal/app"
	"github.com/alecthomas/kong"
)

// A service can be made without the features that this file wires in: then their files, and the lines of this file that
// name them, are absent.

// featureFlags are flags of a feature. apply adds them to the config, which already has the process's own flags, and
// returns an error if one is wrong.
type featureFlags interface{ apply(*app.Config) error }

// featureCommands are the commands of features.
type featureCommands struct {
	Console consoleCommand `cmd:"" help:"Serve the operators' console."`
}

// rpcFeatures are commands of rpc.
type rpcFeatures struct {
	Ls rpcOverRabbitMQLs `cmd:"" help:"List services on RabbitMQ with their replicas and waiting requests."`
}

// callFeatures are flags of rpc call.
type callFeatures struct {
	callOverRabbitMQ
}

func (f *callFeatures) all() []callTransport {
	return []callTransport{
		&f.callOverRabbitMQ,
	}
}

// apiFeatures are flags of the command api.
type apiFeatures struct {
	rpcOverRabbitMQAddress
	rpcOverRabbitMQFlags
	durableCallKeys
}

func (f *apiFeatures) all() []featureFlags {
	return []featureFlags{
		&f.rpcOverRabbitMQAddress,
		&f.rpcOverRabbitMQFlags,
		&f.durableCallKeys,
	}
}

// consumerFeatures are flags of the command consumer.
type consumerFeatures struct {
	durableCallLimits
	durableCallKeys
}

func (f *consumerFeatures) all() []featureFlags {
	return []featureFlags{
		&f.durableCallLimits,
		&f.durableCallKeys,
	}
}

// allFeatures are flags of the command all.
type allFeatures struct {
	consoleFlags
	durableCallLimits
	rpcOverRabbitMQFlags
	durableCallKeys
}

func (f *allFeatures) all() []featureFlags {
	return []featureFlags{
		&f.consoleFlags,
		&f.durableCallLimits,
		&f.rpcOverRabbitMQFlags,
		&f.durableCallKeys,
	}
}

// featureTexts are help texts like helpTexts.
var featureTexts = []kong.Vars{
	consoleTexts,
	durableCallTexts,
	rpcOverRabbitMQTexts,
}
