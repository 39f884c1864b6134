// Writes the picture IN as the JPEG file OUT with javax.imageio: Encode QUALITY MODE COLOUR IN OUT.
// MODE: baseline, progressive or optimized; COLOUR: rgb or grey.
import java.awt.image.BufferedImage;
import java.io.File;
import javax.imageio.IIOImage;
import javax.imageio.ImageIO;
import javax.imageio.ImageWriteParam;
import javax.imageio.ImageWriter;
import javax.imageio.plugins.jpeg.JPEGImageWriteParam;
import javax.imageio.stream.ImageOutputStream;

public class Encode {
    public static void main(String[] args) throws Exception {
        BufferedImage source = ImageIO.read(new File(args[3]));
        int type = args[2].equals("grey") ? BufferedImage.TYPE_BYTE_GRAY : BufferedImage.TYPE_INT_RGB;
        BufferedImage picture = new BufferedImage(source.getWidth(), source.getHeight(), type);
        picture.getGraphics().drawImage(source, 0, 0, null);
        ImageWriter writer = ImageIO.getImageWritersByFormatName("jpeg").next();
        JPEGImageWriteParam options = (JPEGImageWriteParam) writer.getDefaultWriteParam();
        options.setCompressionMode(ImageWriteParam.MODE_EXPLICIT);
        options.setCompressionQuality(Float.parseFloat(args[0]));
        if (args[1].equals("progressive")) {
            options.setProgressiveMode(ImageWriteParam.MODE_DEFAULT);
        }
        options.setOptimizeHuffmanTables(args[1].equals("optimized"));
        try (ImageOutputStream out = ImageIO.createImageOutputStream(new File(args[4]))) {
            writer.setOutput(out);
            writer.write(null, new IIOImage(picture, null, null), options);
        }
    }
}
