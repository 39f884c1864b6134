// Writes the tar OUT of the members in the JSON file IN with Go's archive/tar: write FORMAT IN OUT.
package main

import (
	"archive/tar"
	"encoding/json"
	"os"
	"time"
)

type member struct {
	Name, Kind, Text, Link string
	Owner                  int
	Time                   float64
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	text, err := os.ReadFile(os.Args[2])
	check(err)
	var members []member
	check(json.Unmarshal(text, &members))
	out, err := os.Create(os.Args[3])
	check(err)
	formats := map[string]tar.Format{"ustar": tar.FormatUSTAR, "pax": tar.FormatPAX, "gnu": tar.FormatGNU, "any": tar.FormatUnknown}
	kinds := map[string]byte{"file": tar.TypeReg, "folder": tar.TypeDir, "symlink": tar.TypeSymlink, "hardlink": tar.TypeLink}
	writer := tar.NewWriter(out)
	for _, m := range members {
		seconds := int64(m.Time)
		when := time.Unix(seconds, int64((m.Time-float64(seconds))*1e9))
		check(writer.WriteHeader(&tar.Header{
			Name: m.Name, Typeflag: kinds[m.Kind], Linkname: m.Link, Size: int64(len(m.Text)), Mode: 0o644,
			Uid: m.Owner, ModTime: when, Format: formats[os.Args[1]],
		}))
		_, err := writer.Write([]byte(m.Text))
		check(err)
	}
	check(writer.Close())
	check(out.Close())
}
