package main

import "maps"

func init() {
	maps.Copy(wrongSettings, map[string]wrongSetting{
		"none for the console": {"API_KEYS=", "console", "--insecure-no-auth"},
		"console address":      {"CONSOLE_ADDR=nowhere", "all", "--console-addr"},
	})
	startOrder = append(startOrder, processRole{"console", "shop_operator"})
}
