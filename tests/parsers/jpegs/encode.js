// Writes the raw RGBA file IN as the JPEG file OUT with jpeg-js, in pure JavaScript: encode.js QUALITY WIDTH HEIGHT IN OUT.
const fs = require("fs");
const jpeg = require("jpeg-js");
const [quality, width, height, input, output] = process.argv.slice(2);
const picture = { data: fs.readFileSync(input), width: Number(width), height: Number(height) };
fs.writeFileSync(output, jpeg.encode(picture, Number(quality)).data);
