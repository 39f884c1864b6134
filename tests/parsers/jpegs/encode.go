// Writes the PPM file IN as the JPEG file OUT with Go's image/jpeg: encode QUALITY COLOUR IN OUT; COLOUR: rgb or grey.
package main

import (
	"bufio"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/jpeg"
	"io"
	"os"
	"strconv"
)

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	quality, err := strconv.Atoi(os.Args[1])
	check(err)
	in, err := os.Open(os.Args[3])
	check(err)
	reader := bufio.NewReader(in)
	var width, height, most int
	_, err = fmt.Fscanf(reader, "P6\n%d %d\n%d\n", &width, &height, &most)
	check(err)
	pixels := make([]byte, 3*width*height)
	_, err = io.ReadFull(reader, pixels)
	check(err)
	picture := image.NewRGBA(image.Rect(0, 0, width, height))
	for i := 0; i < width*height; i++ {
		picture.Set(i%width, i/width, color.RGBA{pixels[3*i], pixels[3*i+1], pixels[3*i+2], 255})
	}
	var result image.Image = picture
	if os.Args[2] == "grey" {
		grey := image.NewGray(picture.Bounds())
		draw.Draw(grey, grey.Bounds(), picture, image.Point{}, draw.Src)
		result = grey
	}
	out, err := os.Create(os.Args[4])
	check(err)
	check(jpeg.Encode(out, result, &jpeg.Options{Quality: quality}))
	check(out.Close())
}
