//go:build unix

package testenv

import (
	"fmt"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// Metrics returns the value of each metric, or the count of a histogram, by name and attribute values.
func Metrics(t testing.TB, reader *metric.ManualReader) map[string]float64 {
	t.Helper()
	var found metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &found); err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	add := func(name string, attributes attribute.Set, value float64) {
		label := ""
		for _, pair := range attributes.ToSlice() {
			label += pair.Value.String()
		}
		values[fmt.Sprintf("%s{%s}", name, label)] += value
	}
	for _, scope := range found.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, point := range data.DataPoints {
					add(m.Name, point.Attributes, float64(point.Value))
				}
			case metricdata.Sum[float64]:
				for _, point := range data.DataPoints {
					add(m.Name, point.Attributes, point.Value)
				}
			case metricdata.Gauge[int64]:
				for _, point := range data.DataPoints {
					add(m.Name, point.Attributes, float64(point.Value))
				}
			case metricdata.Gauge[float64]:
				for _, point := range data.DataPoints {
					add(m.Name, point.Attributes, point.Value)
				}
			case metricdata.Histogram[int64]:
				for _, point := range data.DataPoints {
					add(m.Name, point.Attributes, float64(point.Count))
				}
			case metricdata.Histogram[float64]:
				for _, point := range data.DataPoints {
					add(m.Name, point.Attributes, float64(point.Count))
				}
			default:
				t.Fatalf("%s is a %T", m.Name, data)
			}
		}
	}
	return values
}
