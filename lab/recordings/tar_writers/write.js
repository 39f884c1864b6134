// Writes the tar OUT of the files in a folder with node's tar, as npm packs: write.js FORMAT MODULE FOLDER OUT NAME...
const [format, module_, folder, out, ...names] = process.argv.slice(2);
const tar = require(module_);
const options = { cwd: folder, file: out, sync: true, noDirRecurse: true };
if (format === "npm") Object.assign(options, { portable: true, prefix: "package" });
if (format === "ustar") Object.assign(options, { noPax: true });
tar.create(options, names);
