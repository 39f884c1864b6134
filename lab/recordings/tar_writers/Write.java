// Writes the tar OUT of the members in the text file IN with Apache Commons Compress: Write FORMAT IN OUT.
// A line of IN is a member: kind, name, link, owner, seconds and text, separated by tabs.
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import org.apache.commons.compress.archivers.tar.TarArchiveEntry;
import org.apache.commons.compress.archivers.tar.TarArchiveOutputStream;

public class Write {
    public static void main(String[] args) throws Exception {
        boolean gnu = args[0].equals("gnu");
        try (TarArchiveOutputStream out = new TarArchiveOutputStream(Files.newOutputStream(Path.of(args[2])), "UTF-8")) {
            out.setLongFileMode(gnu ? TarArchiveOutputStream.LONGFILE_GNU : TarArchiveOutputStream.LONGFILE_POSIX);
            out.setBigNumberMode(gnu ? TarArchiveOutputStream.BIGNUMBER_STAR : TarArchiveOutputStream.BIGNUMBER_POSIX);
            out.setAddPaxHeadersForNonAsciiNames(!gnu);
            for (String line : Files.readAllLines(Path.of(args[1]))) {
                String[] cells = line.split("\t", -1);
                byte[] text = cells[5].getBytes(StandardCharsets.UTF_8);
                byte link = cells[0].equals("symlink") ? (byte) '2' : (byte) '1';
                TarArchiveEntry entry = cells[2].isEmpty() ? new TarArchiveEntry(cells[1]) : new TarArchiveEntry(cells[1], link);
                entry.setLinkName(cells[2]);
                entry.setSize(text.length);
                entry.setUserId(Long.parseLong(cells[3]));
                entry.setModTime((long) (Double.parseDouble(cells[4]) * 1000));
                out.putArchiveEntry(entry);
                out.write(text);
                out.closeArchiveEntry();
            }
        }
    }
}
