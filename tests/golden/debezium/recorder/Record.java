import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.format.Json;
import java.io.FileReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.Base64;
import java.util.Properties;

/** Runs a connector and writes what it would send to Kafka, one event a line of tabs and base64. */
public class Record {
    public static void main(String[] arguments) throws Exception {
        Properties settings = new Properties();
        settings.load(new FileReader(arguments[0], StandardCharsets.UTF_8));
        PrintStream out = new PrintStream(arguments[1], StandardCharsets.UTF_8);
        DebeziumEngine<ChangeEvent<String, String>> engine =
            DebeziumEngine.create(Json.class, Json.class, Json.class)
                .using(settings)
                .notifying((events, committer) -> {
                    for (ChangeEvent<String, String> event : events) {
                        StringBuilder line = new StringBuilder(event.destination());
                        line.append('\t').append(text(event.key()));
                        line.append('\t').append(text(event.value()));
                        event.<Object>headers().forEach(header -> line.append('\t')
                            .append(header.getKey()).append('=').append(text(header.getValue())));
                        out.println(line);
                        committer.markProcessed(event);
                    }
                    out.flush();
                    committer.markBatchFinished();
                })
                .using((success, message, error) -> System.err.println(message + " " + error))
                .build();
        engine.run();
    }

    private static String text(Object value) {
        if (value == null) {
            return "-";
        }
        return Base64.getEncoder().encodeToString(
            value.toString().getBytes(StandardCharsets.UTF_8));
    }
}
