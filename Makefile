# All tasks of this project. `make` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS := -X main.version=$(VERSION)
# The same commit gives the same bytes in every folder and on every machine: no paths, no C. The Dockerfile does the
# same. These flags compile every package anew, so only releases use them: all other targets compile like a plain
# `go build`, and share its cache.
RELEASE := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w $(LDFLAGS)'
STACK   := .stack/bin/stack

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# example
demo: $(STACK) ## Run the demo: orders travel while relay and consumer are killed, then the ledger
	$(STACK) -- go run ./cmd/demo
# /example

up: $(STACK) build ## Start servers and service, and leave them running
	@bash scripts/up.sh

# example
load: $(STACK) ## Place orders with the service of `make up`, then print their ledger
	@test -s .stack/dev/api-key || { echo 'run make up first' >&2; exit 1; }
	@$(STACK) -- go run ./cmd/demo --attach=http://127.0.0.1:$${API_PORT:-8080} --api-key="$$(cat .stack/dev/api-key)"
# /example

down: $(STACK) ## Stop everything that `make up` started
	@$(STACK) down

test: $(STACK) ## Run every test, with the race detector, on real servers
	@bash scripts/need.sh gcc gcc libc6-dev
	@bash scripts/need.sh promtool prometheus
	$(STACK) --profile test -- go test -race -count=1 -timeout 20m ./...

test-settings: $(STACK) ## Test on a Postgres with other settings; SETTINGS="lock_timeout=1s" for one of them
	@bash scripts/need.sh psql postgresql-client
	@$(STACK) --profile test -- bash scripts/test_settings.sh $(SETTINGS)

conformance: $(STACK) ## Run Connect's conformance suite against the API, over every transport
	$(STACK) -- bash scripts/conformance.sh

FUZZTIME ?= 1m
fuzz: $(STACK) ## Send bad input to every procedure, for FUZZTIME each
	FUZZTIME=$(FUZZTIME) $(STACK) --profile test -- go test -count=1 -timeout 0 -v -run '^TestBadInput' ./internal/app/

lint: ## Run static and protobuf checks, and check that generated code is current
	bash scripts/lint.sh

# template
new-test: ## Make services from this template, by the guide and by gonew, and run their tests
	go test -tags new -count=1 -timeout 30m -v -run '^TestMade' ./cmd/new/
.PHONY: new-test
# /template
ci: lint test conformance ## Run the main checks of CI

# example
bench: $(STACK) release ## Measure against RabbitMQ's own ceiling and peers, 25 minutes; ROWS="relay idle" for some rows
	go build -C bench -o ../.stack/bin/bench .
	$(STACK) -- .stack/bin/bench $(if $(ROWS),$(ROWS),--out docs/benchmarks.md)
	@$(if $(ROWS),,$(QUOTE))

# Copies the numbers of docs/benchmarks.md into the pages that quote them.
QUOTE := go test -count=1 -run '^TestBenchmarksAreQuotedAsTheyAre$$' ./internal/dev/architecture -update
# /example

docs: $(STACK) ## Write the parts of pages that come from the code
	$(STACK) --profile test -- go test -count=1 -run '^TestConfigurationPage$$' ./cmd/shop -update
# example
	$(QUOTE)
# /example

build: ## Build bin/shop
	go build -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/shop ./cmd/shop

release: ## Build bin/shop as releases do: the same bytes on every machine
	$(RELEASE) -o bin/shop ./cmd/shop

reproducible: ## Build this commit twice from scratch, and compare
	bash scripts/reproducible.sh '$(VERSION)'

image: ## Build the container image shop:VERSION
	docker build --build-arg VERSION=$(VERSION) --target shop -t shop:$(VERSION) .
# example
	docker build --build-arg VERSION=$(VERSION) --target load -t shop-load:$(VERSION) .
# /example

# Docker's default driver can build neither an SBOM nor an image for two platforms: `docker buildx create --use` makes a
# builder that can.
image-release: ## Build the image for amd64 and arm64 with SBOM and provenance, as bin/image.tar
	mkdir -p bin
	docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=$(VERSION) \
		--build-arg SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) --sbom=true --provenance=mode=max \
		--output type=oci,dest=bin/image.tar,rewrite-timestamp=true . || { rm -f bin/image.tar; exit 1; }

# example
compose-test: ## Test the composed stack with the local Docker: orders, kills, ledger
	bash scripts/compose_test.sh
# /example

kubernetes: ## Check deploy/kubernetes against Kubernetes' own schemas
	bash scripts/kubernetes.sh

vuln: ## Find known vulnerabilities in code that the programs really call
	go tool -modfile=tools/go.mod govulncheck ./...

# console
console: ## Build the console of web/console into internal/console/dist
	bash scripts/console.sh
.PHONY: console
# /console

generate: ## Generate code from proto/
	@bash scripts/packages.sh tools web
	tools/node_modules/.bin/buf generate
	tools/node_modules/.bin/buf generate --template buf.gen.web.yaml
	bash scripts/conformance_code.sh .

import-api: ## Copy the API and events of another service into apis/; FROM=../billing/proto or a git repository
	@bash scripts/packages.sh tools
	bash scripts/import_api.sh '$(FROM)'
.PHONY: import-api

# Always built: go build knows what is out of date.
$(STACK): FORCE
	@go build -o $@ ./cmd/stack

FORCE:
.PHONY: help up down test test-settings conformance fuzz lint ci docs build release reproducible image image-release \
	kubernetes vuln generate FORCE
# example
.PHONY: demo load bench compose-test
# /example
