# One image for every process of the service: a static program, the certificate authorities and nothing else. No shell,
# no packages to patch, no base image to follow.
FROM --platform=$BUILDPLATFORM golang:1.26.8-trixie AS build
WORKDIR /src
# Modules are downloaded again only when they change.
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY . .
ARG VERSION=development
ARG TARGETOS TARGETARCH
# As in the Makefile: the same commit gives the same bytes on every machine.
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/cache \
    GOCACHE=/cache CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" -o /out/ ./cmd/shop

# example
# Places orders and balances the ledger.
FROM build AS build-load
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/cache \
    GOCACHE=/cache CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w" -o /out/ ./cmd/demo
# /example

FROM scratch AS base
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
# A number, since there is no /etc/passwd, and so that Kubernetes can see that it is not root.
USER 65532:65532

# example
FROM base AS load
COPY --from=build-load /out/demo /demo
ENTRYPOINT ["/demo"]
# /example

# Last, so that `docker build .` builds it.
FROM base AS shop
COPY --from=build /out/shop /shop
ENV LISTEN=:8080 OPS_LISTEN=:9180
EXPOSE 8080 9180
ENTRYPOINT ["/shop"]
CMD ["all"]
