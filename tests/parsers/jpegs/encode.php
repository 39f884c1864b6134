<?php
// Writes the PNG file IN as the JPEG file OUT with PHP's gd: encode.php QUALITY INTERLACED IN OUT.
$picture = imagecreatefrompng($argv[3]);
imageinterlace($picture, (bool) $argv[2]);
imagejpeg($picture, $argv[4], (int) $argv[1]);
