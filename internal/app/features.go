package app

// A service can be made without the features that this file lists: then their files, and the lines of this file that
// name them, are absent.

// Features configures the features.
type Features struct {
	DurableCalls    DurableCalls
	RPCOverRabbitMQ RPCOverRabbitMQ
	Console         Console
}

// features lists the features, in the order of their interceptors.
var features = []func(*process) feature{
	durableCalls,
	rpcOverRabbitMQ,
	operatorsConsole,
	durableCallsInConsole,
}

// shared is the state that features share with each other.
type shared struct {
	durableCalls *processCalls
	forwarded    forwardedCalls // of durableCalls
}
