package main

import (
	"go/format"
	"path"
	"strings"
)

// The template calls its service shop, a word that occurs nowhere else (TestTheServicesNameStandsAlone). So making a
// new service means replacing one word and one module path.
const (
	templateModule  = "example.com/shop"
	templateService = "shop"
)

// guideExamples replaces calls and events of the example domain in a bare tree, which has none of them, by those that
// the guide adds.
var guideExamples = strings.NewReplacer(
	"orders.v1", "invoices.v1", "orders/v1", "invoices/v1", "ordersv1", "invoicesv1", "internal/orders",
	"internal/invoices", `orders\.v1`, `invoices\.v1`, "OrderService", "InvoiceService",
	"OrderPlaced", "InvoiceCreated", "OrderConfirmed", "InvoiceConfirmed", "OrderArchived", "InvoiceArchived",
	"PlaceOrder", "CreateInvoice", "SetStock", "CreateInvoice", "GetOrder", "GetBalance", "order-", "invoice-",
	`{"sku": "apple", "total": 10}`,
	`{"invoiceId": "0190c0de-0000-7000-8000-000000000001", "customerId": "ann", "cents": 1200}`,
	`{"order_id": "..."}`, `{"customer_id": "ann"}`,
	"fulfillment", "balances", "of notifications", "of balances", "--group notifications", "--group balances",
	"notifications  ", "balances       ", "group        notifications", "group        balances",
	"record notification", "add to balance",
)

// verbatim reports whether a file is vendored or written by a tool, and therefore copied unchanged.
func verbatim(name string) bool {
	return strings.HasPrefix(name, "proto/buf/") || path.Base(name) == "LICENSE" || path.Base(name) == "go.sum"
}

// renamed returns a file's name and text in the new tree.
func (o *options) renamed(name, text string) (newName, newText string, err error) {
	if verbatim(name) {
		return name, text, nil
	}
	if o.bare && name != measured && name != guide && !strings.HasPrefix(name, coreMigrations) {
		text = guideExamples.Replace(text)
	}
	text = o.names().Replace(text)
	if name == guide { // its own example must name the new service
		text = strings.NewReplacer("github.com/acme/billing", o.module, "billing", o.service).Replace(text)
	}
	name = strings.ReplaceAll(name, templateService, o.service)
	if path.Ext(name) != ".go" {
		return name, text, nil
	}
	formatted, err := format.Source([]byte(text)) // sorts the imports again
	return name, string(formatted), err
}

// names replaces the template's module and service by the new ones. A buf module's name has three parts, whatever the
// Go module's path is.
func (o *options) names() *strings.Replacer {
	return strings.NewReplacer(
		"name: "+templateModule+"/api", "name: example.com/"+o.service+"/api",
		templateModule, o.module, o.oldModule, o.module,
		templateService, o.service, strings.ToUpper(templateService), strings.ToUpper(o.service),
	)
}
