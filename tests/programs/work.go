// Two goroutines that allocate, sort and recurse: stacks that move, a collector, and channels.
package main

import (
	"fmt"
	"sort"
	"strings"
)

func fib(n int) int {
	if n < 2 {
		return n
	}
	return fib(n-1) + fib(n-2)
}

func work(round int) int {
	names := map[string]int{}
	for i := 0; i < 100; i++ {
		names[fmt.Sprint(i*round)] = i
	}
	var sorted []string
	for name := range names {
		sorted = append(sorted, strings.ToUpper(name))
	}
	sort.Strings(sorted)
	return len(sorted) + fib(15)
}

func main() {
	results := make(chan int)
	for worker := 0; worker < 2; worker++ {
		go func() {
			for round := 0; ; round++ {
				results <- work(round)
			}
		}()
	}
	sum := 0
	for result := range results {
		sum += result
	}
}
