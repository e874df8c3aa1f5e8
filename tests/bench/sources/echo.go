// A goroutine for each connection: echo PORT.
package main

import (
	"net"
	"os"
)

func serve(conn net.Conn) {
	defer conn.Close()
	data := make([]byte, 4096)
	for {
		count, err := conn.Read(data)
		if err != nil {
			return
		}
		if _, err := conn.Write(data[:count]); err != nil {
			return
		}
	}
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		go serve(conn)
	}
}
