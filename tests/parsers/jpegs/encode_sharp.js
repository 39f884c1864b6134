// Writes the PNG file IN as the JPEG file OUT with sharp: encode_sharp.js OPTIONS_AS_JSON IN OUT.
const sharp = require("sharp");
const [options, input, output] = process.argv.slice(2);
sharp(input).jpeg(JSON.parse(options)).toFile(output);
